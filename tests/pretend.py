"""A GPU that there is not: tensors that say they are on another device and refuse to be mixed with others.

    with pretend.gpu():
        pair = load_pair(...)                   # its weights are "there", and so is all that is computed with them

What code for a GPU gets wrong most of the time is where its tensors are. Here a product of tensors on two devices raises,
and `.numpy()` of one that is there. The numbers are those of the CPU, so a run with it must end as one without it. Of the
memory, speed and rounding of a real one nothing is learned.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fx import models, quality, similarity


class _Backend:
    """What torch asks of a kind of device: there is none of it but within `gpu`, and nothing is random on it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME := "pretended", _Backend())
GPU = torch.device(NAME, 0)
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor)  # take tensors of two devices
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Elsewhere(Tensor):
    """A tensor that says it is on the GPU; `held` is where its numbers are."""

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False):
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _do(func, args, kwargs or {})

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Elsewhere(inner["held"])


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _do(func, args, kwargs or {})


def _do(func, args, kwargs):
    given, devices = [], []
    _each((args, kwargs), lambda value: _sort(value, given, devices))
    there = [value for value in given if isinstance(value, Elsewhere)]
    asked = devices[0] if devices else None
    _check(func, args, given, there)
    if func is aten._fused_sdp_choice.default:
        return 0  # attention by plain operations: the fused ones of a GPU are not here
    held_args, held_kwargs = _each((args, kwargs), _here)
    out = func(*held_args, **held_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if (asked.type == NAME) if asked is not None else bool(there):
        out = _each(out, lambda value: Elsewhere(value) if isinstance(value, Tensor) else value)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out
    return out


def _each(value, change):
    """The same lists, tuples and dictionaries of what `change` makes of everything in them."""
    if isinstance(value, tuple | list):
        return type(value)([_each(part, change) for part in value])
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    return change(value)


def _sort(value, tensors: list, devices: list) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, torch.device):
        devices.append(value)


def _here(value):
    """What an operator on the CPU is given in its place."""
    if isinstance(value, Elsewhere):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _check(func, args, given, there) -> None:
    """RuntimeError where a GPU would raise one."""
    if not there or func in MOVES:
        return
    if func in INDEXED:  # a GPU takes indices from the CPU
        given = [value for value in (args[0], *args[2:3]) if isinstance(value, Tensor)]
    here = [value for value in given if not isinstance(value, Elsewhere) and value.dim() > 0]
    if here and any(isinstance(value, Elsewhere) for value in given):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu! ({func})"
        )


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """As if this machine had a GPU, for what is done inside."""
    with contextlib.ExitStack() as stack:
        for module in (models, quality, similarity):
            stack.enter_context(mock.patch.object(module, "device", return_value=GPU))
        # modules that move get new parameters: those they have cannot become tensors of another kind
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes it on the CPU first
        # the libraries that save tensors tell by their places in memory which of them are one
        place = safetensors.torch.storage_ptr
        own = mock.patch.object(safetensors.torch, "storage_ptr", lambda tensor: place(getattr(tensor, "held", tensor)))
        stack.enter_context(own)
        stack.enter_context(
            mock.patch.object(torch, "inference_mode", torch.no_grad)
        )  # knows no tensors of other kinds
        stack.enter_context(_Mode())
        yield
