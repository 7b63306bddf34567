"""One resumable training loop for all mini models."""

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: a trapezoid learning rate (linear warm-up, constant, linear decay to zero)."""

    steps: int
    lr: float
    warmup: int = 200
    decay: float = 0.3  # share of the steps spent in the final linear decay
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate at `step` (0-based)."""
        up = min(1.0, (step + 1) / self.warmup)
        down = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.lr * up * down


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    save_every: float = 240.0,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[nn.Module, list[dict]]:
    """Minimise `loss(model, rng)["loss"]`; return the EMA model and the log (means of 20 steps a row).

    precision: of the forward and backward pass (autocast); weights, optimiser and average stay in float32.
    compiled: run the model through torch.compile, which needs a C++ compiler and minutes at the start.

    State lies in `folder`/state.pt, written with a row of the log once `save_every` seconds have passed; a killed run
    goes on from there. The batches of step i are drawn from a generator seeded with i, so a resumed run sees what an
    uninterrupted one would have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    first, log = 0, []
    if (state_file := folder / "state.pt").exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["step"], json.loads((folder / "log.json").read_text())
        log = [row for row in log if row["step"] < first]
    saved = time.monotonic()
    began = saved - (log[-1]["seconds"] if log else 0.0)
    recent: list[dict[str, float]] = []
    model.train()
    called = torch.compile(model) if compiled else model
    for step in (bar := tqdm(range(first, schedule.steps), initial=first, total=schedule.steps, mininterval=5)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            terms = loss(called, torch.Generator().manual_seed(step))
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _update(average, model, min(schedule.ema, (1 + step) / (10 + step)))
        recent.append({name: value.item() for name, value in terms.items()})
        if (step + 1) % 20 == 0 or step + 1 == schedule.steps:
            means = {name: sum(row[name] for row in recent) / len(recent) for name in terms}
            log.append({"step": step, "lr": schedule.rate(step), "seconds": time.monotonic() - began, **means})
            bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()}, refresh=False)
            recent = []
        if (not recent and time.monotonic() - saved > save_every) or step + 1 == schedule.steps:
            _save(folder, model, average, optimizer, step + 1, log)
            saved = time.monotonic()
    return average, log


def load_average(model: nn.Module, folder: Path) -> int:
    """Give `model` the averaged weights that `train` last kept in `folder`; the number of steps they have seen."""
    state = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(state["average"])
    return state["step"]


@torch.no_grad()
def _update(average: nn.Module, model: nn.Module, keep: float) -> None:
    old, new = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(old, new, 1 - keep)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def _save(folder: Path, model: nn.Module, average: nn.Module, optimizer, step: int, log: list[dict]) -> None:
    state = {"model": model.state_dict(), "average": average.state_dict(), "step": step}
    torch.save({**state, "optimizer": optimizer.state_dict()}, part := folder / "state.pt.part")
    (log_part := folder / "log.json.part").write_text(json.dumps(log))
    os.replace(log_part, folder / "log.json")
    os.replace(part, folder / "state.pt")
