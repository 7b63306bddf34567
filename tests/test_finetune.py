"""Fine-tuning against plain torch, its promises about seeds, kills and steps, and what it leaves on disk."""

import copy
import functools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.func import functional_call

from fx import families, finetune, results, tuned
from fx.datasets import Item, load_images, load_item
from fx.defenses import TRANSFORMS, Change
from fx.families import denoise, encode, network, network_name
from fx.finetune import Bayesian, FineTune, NoisyGradients, PriorPreservation, TrainingItem, load_training
from fx.models import LORA_FILE, load_pipeline
from fx.tuned import load_tuned, own_caption

WEIGHTS = {"dreambooth": "unet/diffusion_pytorch_model.safetensors", "lora": LORA_FILE}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
T = 1000


@pytest.fixture
def spec(tiny_sd, picture_folder):
    """A function that gives the spec of a method on the four pictures; options replace its fields."""

    def make(method: str, /, **options) -> FineTune:
        fields = {"base": str(tiny_sd), "method": method, "learning_rate": 1e-3, "seed": 5}
        sizes = {"steps_per_image": 3, "batch_size": 2} | ({"rank": 2, "alpha": 6} if method == "lora" else {})
        return FineTune(**({"training": (TrainingItem(str(picture_folder), "a dog"),)} | fields | sizes | options))

    return make


@pytest.fixture
def pictures(picture_folder) -> torch.Tensor:
    """The four pictures, float32 [4, 3, 16, 16] in [-1, 1]."""
    return load_images(load_item(str(picture_folder), "a dog").training, 16)


@pytest.fixture
def fresh(tiny_pipeline):
    """A function that gives a pipeline with a U-Net of its own, as if loaded anew."""

    def make():
        pipeline = copy.copy(tiny_pipeline)
        pipeline.unet = copy.deepcopy(tiny_pipeline.unet)
        return pipeline

    return make


@pytest.fixture
def fresh64(fresh):
    """`fresh` in float64. Where training is compared with a twin that sums in another order, float32 is not enough: AdamW
    turns the rounding of a gradient near zero into a step of the full learning rate. In float64 that rounding lies
    far below the 1e-8 in AdamW's denominator, on every processor."""

    def make():
        pipeline = fresh()
        for part in ("unet", "vae", "text_encoder"):
            setattr(pipeline, part, copy.deepcopy(getattr(pipeline, part)).double())
        return pipeline

    return make


@pytest.fixture
def trained(fresh, pictures, tmp_path):
    """A function that trains a pipeline, fresh if none is given, by a spec; its U-Net's weights and its losses."""

    def run(spec: FineTune, images: torch.Tensor = pictures, scratch: str = "scratch", pipeline=None, captions=None):
        pipeline, folder = pipeline or fresh(), tmp_path / scratch
        folder.mkdir(exist_ok=True)
        losses, _ = finetune.train(pipeline, images, captions or ["a dog"] * len(images), spec, folder)
        return pipeline.unet.state_dict(), losses

    return run


def equal(first: dict, second: dict) -> bool:
    """Whether two state dicts are the same bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# the independent twin, in float64: the loss written out, gradients by autograd, clipping and AdamW by hand


def alpha_bar(pipeline) -> torch.Tensor:
    """The scheduler's own table, float32 [1000], once it is known to be Stable Diffusion's to float32's precision."""
    stored = pipeline.scheduler.alphas_cumprod
    np.testing.assert_allclose(stored, np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2), rtol=1e-4)
    return stored


def twin_noise_prediction(unet, values: dict, alpha: float, *arguments) -> torch.Tensor:
    """The U-Net with some weights replaced: "x.weight" itself, or ("x", down, up) as W + alpha / rank * up @ down."""
    weights = {name: value for name, value in values.items() if isinstance(name, str)}
    for name, _ in (key for key in values if isinstance(key, tuple) and key[1] == "down"):
        down, up = values[name, "down"], values[name, "up"]
        weights[f"{name}.weight"] = unet.get_parameter(f"{name}.weight") + alpha / len(down) * up @ down
    return functional_call(unet, weights, arguments).sample


def texts(pipeline, *captions: str) -> torch.Tensor:
    """Captions as the text encoder reads them, one row each, by the tokenizer and the encoder themselves."""
    tokens = pipeline.tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(tokens)[0]


def twin_loss(pipeline, values: dict, pictures, text, spec: FineTune, step: int) -> torch.Tensor:
    """The mean squared error of one step in terms of `values`, the draws in the order that `train` documents.

    text: the encoded caption of each picture.
    """
    torch.manual_seed(spec.seed * 1_000_003 + step)
    chosen = torch.randint(len(pictures), (spec.batch_size,))
    with torch.no_grad():
        moments = pipeline.vae.quant_conv(pipeline.vae.encoder(pictures.double()))[chosen]
    mean, log_variance = moments.chunk(2, dim=1)
    x0 = (mean + torch.exp(log_variance / 2) * torch.randn(mean.shape)) * pipeline.vae.config.scaling_factor
    t = torch.randint(T, (spec.batch_size,))
    eps = torch.randn(x0.shape)
    kept = alpha_bar(pipeline)[t].double()[:, None, None, None]
    x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * eps
    predicted = twin_noise_prediction(pipeline.unet, values, spec.alpha, x_t, t, text[chosen])
    wanted = {"epsilon": eps, "sample": x0, "v_prediction": kept.sqrt() * eps - (1 - kept).sqrt() * x0}
    return ((predicted - wanted[pipeline.scheduler.config.prediction_type]) ** 2).mean()


def twin_training(pipeline, values: dict, pictures, text, spec: FineTune, steps: int, added=None) -> list[float]:
    """Update `values` by AdamW (0.9, 0.999, 1e-8, decay 0.01) on gradients clipped to norm 1; the losses.

    added: a function of the values and the step, whose result is minimised too.
    """
    return twin_descent(
        values, lambda asked, step: twin_loss(pipeline, asked, pictures, text, spec, step), spec, steps, added
    )


def twin_descent(values: dict, loss_at, spec: FineTune, steps: int, added=None) -> list[float]:
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    losses, rate = [], spec.learning_rate
    for step in range(steps):
        asked = {name: value.requires_grad_() for name, value in values.items()}
        loss = loss_at(asked, step)
        total = loss + added(asked, step) if added else loss
        gradients = dict(zip(asked, torch.autograd.grad(total, list(asked.values())), strict=True))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, 1.0 / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            values[name] = values[name].detach() * (1 - rate * 0.01) - rate * mean / (square.sqrt() + 1e-8)
        losses.append(loss.item())
    return losses


def test_dreambooth_is_adamw_on_every_weight(spec, fresh64, pictures, trained):
    asked = spec("dreambooth", steps_per_image=1)  # two steps of two images
    pipeline = fresh64()
    values = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    losses = twin_training(pipeline, values, pictures, texts(pipeline, *["a dog"] * 4), asked, steps=2)
    weights, found = trained(asked, pipeline=fresh64())
    assert np.allclose(found, losses, rtol=1e-6, atol=0)  # losses are stored in float32
    assert weights.keys() == values.keys()
    for name, value in values.items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-9), name
        assert not torch.equal(weights[name], pipeline.unet.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_model_learns_what_it_predicts(spec, fresh64, pictures, kind, tmp_path):
    asked = spec("dreambooth", steps_per_image=1)
    twin, pipeline = fresh64(), fresh64()
    for one in (twin, pipeline):
        one.scheduler = type(one.scheduler).from_config(one.scheduler.config, prediction_type=kind)
    values = {name: value.detach().clone() for name, value in twin.unet.named_parameters()}
    expected = twin_training(twin, values, pictures, texts(twin, *["a dog"] * 4), asked, steps=2)
    found, _ = finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path)
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_every_image_is_learned_under_its_own_caption(spec, fresh64, pictures, trained, method):
    """Of the two captions, one is on images 0 and 3: neither the order of items nor that of captions can stand in."""
    asked = spec(method, steps_per_image=2, batch_size=4)
    captions = ["a dog", "a cat", "a cat", "a dog"]
    pipeline = fresh64()
    if method == "dreambooth":
        values = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    else:
        adapted = fresh64()
        finetune.trained_parameters(adapted, asked)
        values = lora_values(adapted.unet.state_dict())
    losses = twin_training(pipeline, values, pictures, texts(pipeline, *captions), asked, steps=2)
    _, found = trained(asked, pipeline=fresh64(), captions=captions)
    assert np.allclose(found, losses, rtol=1e-6, atol=0)
    _, swapped = trained(asked, scratch="swapped", pipeline=fresh64(), captions=["a cat", "a dog", "a dog", "a cat"])
    assert abs(swapped - losses).max() > 1e-4 * max(losses)


def lora_values(weights: dict) -> dict:
    """The factors of a LoRA in a state dict as the twin takes them: (layer, "down" or "up") -> factor."""
    parts = {".lora_A.default.weight": "down", ".lora_B.default.weight": "up"}
    return {
        (name.removesuffix(end), part): value.clone()
        for name, value in weights.items()
        for end, part in parts.items()
        if name.endswith(end)
    }


def test_captions_are_encoded_once_each_and_given_by_image(tiny_pipeline, monkeypatch):
    asked, real = [], finetune.encode
    monkeypatch.setattr(
        finetune, "encode", lambda pipeline, caption, _: asked.append(caption) or real(pipeline, caption)
    )
    given = finetune.condition_source(tiny_pipeline, ["b", "a", "b", "c"])
    assert asked == ["b", "a", "c"]
    rows = given(torch.tensor([3, 0, 1, 2, 0])).text
    assert torch.equal(rows, torch.cat([real(tiny_pipeline, caption).text for caption in "cbabb"]))
    one = finetune.condition_source(tiny_pipeline, ["a"] * 3)(torch.tensor([0, 2]))
    assert torch.equal(one.text, real(tiny_pipeline, "a").text)


def test_lora_is_adamw_on_a_low_rank_addition_and_leaves_the_base_weights_alone(spec, fresh64, pictures, trained):
    asked = spec("lora", steps_per_image=1, batch_size=1, learning_rate=1e-2)  # four steps of one image
    pipeline, adapted = fresh64(), fresh64()
    finetune.trained_parameters(adapted, asked)
    start = {name: value for name, value in adapted.unet.state_dict().items() if "lora" in name}
    targets = [name for name, _ in pipeline.unet.named_modules() if name.endswith(PROJECTIONS)]
    parts = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    values = {(name, part): start[f"{name}.{key}"].clone() for name in targets for part, key in parts.items()}
    assert len(values) == len(start)
    losses = twin_training(pipeline, values, pictures, texts(pipeline, *["a dog"] * 4), asked, steps=4)
    weights, found = trained(asked, pipeline=fresh64())
    assert np.allclose(found, losses, rtol=1e-6, atol=0)
    for (name, part), value in values.items():
        initial, found = start[key := f"{name}.{parts[part]}"], weights[key]
        assert (found - value).norm() < 1e-9 * (value - initial).norm(), key
    unadapted = {name.replace(".base_layer", ""): value for name, value in weights.items() if "lora" not in name}
    assert equal(unadapted, pipeline.unet.state_dict())


def test_a_fresh_adapter_changes_nothing_and_is_fixed_by_the_seed(spec, fresh):
    adapters = []
    for seed in (1, 1, 2):
        pipeline = fresh()
        parameters = finetune.trained_parameters(pipeline, spec("lora", rank=4, seed=seed))
        down = torch.cat([p.flatten() for p in parameters[0::2]])
        up = torch.cat([p.flatten() for p in parameters[1::2]])
        assert torch.count_nonzero(up) == 0
        assert abs(down.std().item() - 1 / 4) < 0.02  # "gaussian": standard deviation 1 / rank
        adapters.append(down)
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


# promises


@pytest.mark.parametrize(
    ("method", "saved", "killed", "precision"),
    [
        ("dreambooth", (2,), 4, "float32"),
        ("lora", (2,), 4, "float32"),
        ("lora", (3,), 3, "float32"),
        ("lora", (), 2, "float32"),
        ("dreambooth", (2,), 4, "bfloat16"),
        ("lora", (3,), 4, "float16"),
    ],
)
def test_killed_and_run_again_the_result_is_the_same_bit_for_bit(
    spec, trained, monkeypatch, method, saved, killed, precision
):
    # in float16 the scale changes every step and soon overflows, so that a scaler that began anew would be seen
    eager = functools.partial(torch.amp.GradScaler, growth_interval=1, growth_factor=64.0)
    monkeypatch.setattr(torch.amp, "GradScaler", eager)
    asked = spec(method, precision=precision)  # six steps
    weights, losses = trained(asked, scratch="uninterrupted")
    real, save, starts = finetune.tqdm, finetune._save, []

    def until_killed(steps, *_, **__):
        starts.append(steps.start)
        for step in steps:
            if step == killed:
                raise KeyboardInterrupt
            yield step

    def at_times(*arguments):
        if arguments[-1] in saved:
            save(*arguments)

    monkeypatch.setattr(finetune, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(finetune, "_save", at_times)
    monkeypatch.setattr(finetune, "tqdm", until_killed)
    with pytest.raises(KeyboardInterrupt):
        trained(asked)
    monkeypatch.setattr(finetune, "tqdm", lambda steps, *a, **k: starts.append(steps.start) or real(steps, *a, **k))
    again, losses_again = trained(asked)
    assert starts == [0, saved[0] if saved else 0]
    assert np.array_equal(losses_again, losses)
    assert equal(again, weights)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dreambooth", {}),
        ("dreambooth", {"text_encoder": True}),
        ("dreambooth", {"protection": Bayesian()}),
        ("lora", {"protection": NoisyGradients()}),
        ("lora", {}),
    ],
)
def test_where_memory_is_short_activations_are_computed_twice_and_the_result_is_the_same(
    spec, fresh, trained, monkeypatch, method, options
):
    asked, real, short, seen = spec(method, **options), finetune.denoise, [3], []
    pipelines = [fresh() for _ in range(2)]
    for pipeline in pipelines:
        pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)
    weights, losses = trained(asked, scratch="enough", pipeline=pipelines[0])

    def denoise(*arguments):
        seen.append(pipelines[1].unet.is_gradient_checkpointing)
        if len(seen) in short:
            raise torch.OutOfMemoryError
        return real(*arguments)

    monkeypatch.setattr(finetune, "denoise", denoise)
    with pytest.warns(UserWarning, match="computed twice"):
        again, losses_again = trained(asked, scratch="short", pipeline=pipelines[1])
    assert seen[:3] == [False] * 3
    assert all(seen[3:])
    assert len(seen) > 3
    assert np.allclose(losses_again, losses, atol=1e-6)
    assert all(torch.allclose(again[name], weights[name], atol=1e-5) for name in weights)
    short[:] = range(1, 10_000)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="computed twice"):
        trained(asked, scratch="none", pipeline=fresh())


def test_the_state_is_saved_once_a_minute_has_passed_since_it_was_saved_last(spec, trained, monkeypatch):
    clock, saved = iter(range(0, 10_000, 25)), []  # 25 seconds from one look to the next
    monkeypatch.setattr(finetune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(finetune, "_save", lambda *arguments: saved.append(arguments[-1]))
    trained(spec("lora"))  # six steps
    assert saved == [3, 6]


@pytest.mark.parametrize("method", finetune.METHODS)
def test_a_spec_fixes_the_weights_and_another_seed_gives_others(spec, tmp_path, monkeypatch, method):
    weights = []
    for place, seed in (("a", 5), ("b", 5), ("c", 6)):
        monkeypatch.setattr(results, "RUNS", tmp_path / place)
        torch.manual_seed(len(weights))  # what went before must not matter
        folder = results.complete(spec(method, steps_per_image=1, seed=seed))
        weights.append(load_file(folder / WEIGHTS[method]))
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


@pytest.mark.parametrize(("n", "steps_per_image", "batch_size", "expected"), [(4, 1, 4, 1), (4, 2, 3, 3), (1, 5, 2, 3)])
def test_steps_are_images_times_steps_per_image_in_batches(
    spec, trained, pictures, n, steps_per_image, batch_size, expected
):
    asked = spec("lora", steps_per_image=steps_per_image, batch_size=batch_size)
    _, losses = trained(asked, pictures[:n])
    assert (losses.shape, losses.dtype) == ((expected,), np.float32)
    assert (losses > 0).all()


def test_the_loss_goes_down_on_one_image(spec, trained, pictures):
    asked = spec("dreambooth", steps_per_image=240, batch_size=4, learning_rate=5e-3)
    _, losses = trained(asked, pictures[:1])
    assert losses[-15:].mean() < 0.6 * losses[:5].mean()


def test_the_transform_is_applied_to_the_drawn_images(spec, trained, fresh64, pictures, monkeypatch):
    seen = []

    def recorded(images):
        seen.append(images)
        return images

    for name, change in {"recorded": recorded, "grey": torch.zeros_like}.items():
        made = Change(lambda images, _, change=change: change(images), usual=0, least=0, most=0)
        monkeypatch.setitem(TRANSFORMS, name, made)
    plain, recorded, grey = (
        trained(spec("dreambooth", transform=name), scratch=name, pipeline=fresh64())[0]
        for name in ("none", "recorded", "grey")
    )
    assert len(seen) == 6
    for step, images in enumerate(seen):
        torch.manual_seed(5 * 1_000_003 + step)
        assert torch.equal(images, pictures[torch.randint(4, (2,))])
    # a transform that does nothing and draws nothing is the same as none, but for rounding in the encoder
    assert all(torch.allclose(recorded[name], plain[name], rtol=0, atol=1e-9) for name in plain)
    assert not all(torch.allclose(grey[name], plain[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("transform", ["cutout", "randaugment", "cutout:0.25", "randaugment:20"])
def test_defenses_train_and_are_fixed_by_the_seed(spec, trained, transform):
    asked = spec("lora", transform=transform, steps_per_image=1)
    first, second = (trained(asked, scratch=name)[0] for name in "ab")
    assert equal(first, second)
    assert not equal(first, trained(spec("lora", steps_per_image=1), scratch="c")[0])


# the step of the runner


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory) -> str:
    """The folder of a tiny model of each family that is fine-tuned."""
    return str(tiny.save(request.param, tmp_path_factory.mktemp("families") / request.param))


@pytest.mark.parametrize("method", finetune.METHODS)
def test_the_saved_model_predicts_what_was_trained(spec, runs, pictures, family, tmp_path, method):
    """The LoRA has alpha 6 at rank 2: loaded with any other alpha it would predict something else."""
    asked, pipeline = spec(method, base=family, learning_rate=2e-2), load_pipeline(family)
    folder = results.complete(asked)
    losses, _ = finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path)
    assert np.array_equal(np.load(folder / "losses.npy"), losses)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(
        ["losses.npy", "manifest.json", *([LORA_FILE] if method == "lora" else [])]
    )
    assert not (runs / "scratch" / folder.name).exists()
    pair = load_tuned(asked)
    text = encode(pipeline, "a dog")
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        found, base = (pair.predict(model, x, t, text) for model in ("tuned", "base"))
        assert torch.allclose(found, denoise(network(pipeline), x, t, text), atol=1e-5)
        assert torch.allclose(base, denoise(network(load_pipeline(family)), x, t, text), atol=1e-5)
    assert (found - base).abs().max() > 1e-2


def test_a_saved_lora_has_the_same_bytes_in_every_process(spec, runs, family):
    """peft keeps the names of the adapted modules as a set, safetensors the entries of a header: in any order."""
    content = (results.complete(spec("lora", base=family, steps_per_image=1)) / LORA_FILE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == ["format", "lora_adapter_metadata"]
    settings = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    (modules,) = (value for name, value in settings.items() if name.endswith(".target_modules"))
    assert len(modules) >= 4
    assert modules == sorted(modules)


def test_the_first_loss_of_every_family_is_that_of_its_own_schedule_and_prediction(spec, family, pictures, tmp_path):
    """Computed from the schedule that sampling walks, zero terminal SNR of Stable Diffusion 2 included."""
    asked, pipeline = spec("dreambooth", base=family, batch_size=4), load_pipeline(family)
    (text,) = (encode(pipeline, "a dog"),)
    torch.manual_seed(5 * 1_000_003)
    chosen = torch.randint(4, (4,))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pictures).latent_dist
        x0 = posterior.mean[chosen] + posterior.std[chosen] * torch.randn(4, 4, 4, 4)
        x0 = (x0 - (pipeline.vae.config.shift_factor or 0)) * pipeline.vae.config.scaling_factor
        t, eps = torch.randint(T, (4,)), torch.randn(x0.shape)
        if family.endswith(("sd3", "flux")):
            level = torch.linspace(1, 1 / T, T)[t]  # of which shift s makes s l / (1 + (s - 1) l); FLUX.1's is dynamic
            level = 3 * level / (1 + 2 * level) if family.endswith("sd3") else level
            x, told, wanted = torch.lerp(x0, eps, level[:, None, None, None]), T * level, eps - x0
        else:
            kept = pipeline.scheduler.alphas_cumprod[t][:, None, None, None]
            x, told = kept.sqrt() * x0 + (1 - kept).sqrt() * eps, t
            velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
            assert velocity == family.endswith("sd2")
            wanted = kept.sqrt() * eps - (1 - kept).sqrt() * x0 if velocity else eps
        predicted = denoise(network(pipeline), x, told, text)
    losses, _ = finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path)
    assert losses[0] == pytest.approx(((predicted - wanted) ** 2).mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", finetune.METHODS)
def test_fine_tuning_lowers_the_loss_of_every_family(spec, family, pictures, tmp_path, method):
    """The loss at 64 draws of its own, the same before and after."""
    steps = 30 if family.endswith("sd3") else 10  # which learns more slowly
    asked, pipeline = spec(method, base=family, learning_rate=3e-3, steps_per_image=steps), load_pipeline(family)
    schedule, text, draw = families.noising(pipeline), encode(pipeline, "a dog"), torch.Generator().manual_seed(0)
    x0 = finetune.latent_source(pipeline, pictures, "none")(torch.arange(64) % 4)
    t, eps = torch.randint(T, (64,), generator=draw), torch.randn(x0.shape, generator=draw)

    def loss() -> float:
        with torch.no_grad():
            found = denoise(network(pipeline), schedule.add(x0, eps, t), schedule.timestep(t), text)
        return (found - schedule.target(x0, eps, t)).square().mean().item()

    before = loss()
    finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path)
    assert loss() < 0.995 * before


def test_a_lora_of_a_transformer_learns_where_the_text_attends_too(spec, runs, tmp_path):
    for family in ("sd3", "flux"):
        asked = spec("lora", base=str(tiny.save(family, tmp_path / family)))
        names = load_file(results.complete(asked) / LORA_FILE)
        for layer in ("to_q", "to_out.0", "add_k_proj", "to_add_out"):
            assert any(f".attn.{layer}." in name for name in names), layer
        assert all(name.startswith("transformer.") for name in names)


def test_a_caption_that_is_too_long_is_refused_before_any_image_is_looked_at(spec, runs, tmp_path, monkeypatch):
    """Whatever the family reads captions by: FLUX.1 cuts off what CLIP does not read, and T5 reads 512 tokens."""
    monkeypatch.setattr(finetune, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    for family, n, limit in (("sdxl", 20, 16), ("flux", 600, 512)):
        part = TrainingItem(spec("dreambooth").training[0].item, "z " * n)
        asked = replace(spec("dreambooth"), training=(part,), base=str(tiny.save(family, tmp_path / family)))
        with pytest.raises(ValueError, match=f"the text encoder reads at most {limit}"):
            results.complete(asked)


def test_a_network_that_predicts_something_unknown_is_refused_before_training(
    spec, fresh, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(families, "prediction_type", lambda pipeline: "noise level")
    monkeypatch.setattr(finetune, "latent_source", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises(
        ValueError, match="models that predict epsilon, sample, v_prediction or a flow, not noise level"
    ):
        finetune.train(fresh(), pictures, ["a dog"] * 4, spec("dreambooth"), tmp_path)


# several items


def test_first_goes_on_into_the_further_works_of_an_item(picture_folder, monkeypatch):
    paths = load_item(str(picture_folder), "a dog").training
    item = Item("style/x", "a dog", paths[:2], (), paths[2:])
    monkeypatch.setattr(finetune, "load_item", lambda name, caption: item)
    assert load_training(TrainingItem("style/x")).training == paths[:2]
    for n in (1, 2, 3, 4):
        assert load_training(TrainingItem("style/x", first=n)).training == paths[:n]
    with pytest.raises(ValueError, match="has 2 training images and 2 further works: first is 1 to 4, not 5"):
        load_training(TrainingItem("style/x", first=5))


def test_first_takes_the_first_images_in_the_order_of_their_names(picture_folder):
    whole = load_item(str(picture_folder), "a dog")
    for n in (1, 3, 4):
        part = load_training(TrainingItem(str(picture_folder), "a dog", first=n))
        assert part == replace(whole, training=whole.training[:n])
    assert load_training(TrainingItem(str(picture_folder), "a dog")) == whole
    for n in (0, -1, 5):
        with pytest.raises(ValueError, match=f"has 4 training images: first is 1 to 4, not {n}"):
            load_training(TrainingItem(str(picture_folder), "a dog", first=n))
    shipped = load_training(TrainingItem("style/mimooh", first=2))
    assert shipped.training == load_item("style/mimooh").training[:2]
    assert shipped.caption == load_item("style/mimooh").caption != ""
    assert shipped.controls == load_item("style/mimooh").controls != ()
    assert load_training(TrainingItem("style/mimooh", "another")).caption == "another"


@pytest.fixture
def other_folder(picture_folder, tmp_path):
    """A folder of the same pictures upside down."""
    (tmp_path / "others").mkdir()
    for path in sorted(picture_folder.iterdir()):
        Image.open(path).rotate(180).save(tmp_path / "others" / path.name)
    return tmp_path / "others"


def test_several_items_are_learned_together_in_the_order_given(spec, runs, trained, picture_folder, other_folder):
    dog, cat = TrainingItem(str(picture_folder), "a dog", 2), TrainingItem(str(other_folder), "a cat", 3)
    for parts, captions in (((dog, cat), ["a dog"] * 2 + ["a cat"] * 3), ((cat, dog), ["a cat"] * 3 + ["a dog"] * 2)):
        asked = spec("lora", training=parts)
        images = torch.cat([load_images(load_training(part).training, 16) for part in parts])
        loaded = load_pipeline(asked.base)  # as the step does: bit for bit holds for the same way only
        _, losses = trained(asked, images, scratch=f"{captions[0]}", captions=captions, pipeline=loaded)
        assert len(losses) == 8  # 5 images, 3 steps for each, 2 at a time
        assert np.array_equal(np.load(results.complete(asked) / "losses.npy"), losses)
    specs = [spec("lora", training=parts) for parts in ((dog, cat), (cat, dog), (dog,), (cat,), (dog, dog))]
    assert len({results.digest(s) for s in specs}) == 5


def test_several_captions_are_no_single_one_and_generate_asks_for_it(spec, picture_folder, other_folder):
    dog, same = TrainingItem(str(picture_folder), "a dog"), TrainingItem(str(other_folder), "a dog")
    both = (dog, replace(same, caption="a cat"))
    assert own_caption(spec("lora")) == own_caption(spec("lora", training=(dog, same))) == "a dog"
    assert own_caption(spec("lora", training=both)) is None
    assert tuned.own_training(spec("lora", training=both)) == both
    shipped = TrainingItem("style/mimooh")
    assert own_caption(spec("lora", training=(shipped,))) == load_item("style/mimooh").caption


# precision


def test_networks_run_in_the_precision_asked_for_and_weights_and_optimiser_in_float32(
    spec, runs, fresh, pictures, tmp_path, monkeypatch
):
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        for method in finetune.METHODS:
            pipeline, seen = fresh(), []
            pipeline.unet.conv_out.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].dtype))
            monkeypatch.setattr(finetune, "SAVE_EVERY", -1.0)
            (scratch := tmp_path / f"{precision}{method}").mkdir()
            finetune.train(pipeline, pictures, ["a dog"] * 4, spec(method, precision=precision), scratch)
            assert set(seen) == {expected}
            state = torch.load(scratch / "state.pt", weights_only=True)
            kept = [*state["trained"], *(v for entry in state["optimizer"]["state"].values() for v in entry.values())]
            assert {value.dtype for value in [*kept, *pipeline.unet.parameters()]} == {torch.float32}
            assert bool(state["scaler"]) == (precision == "float16")


@pytest.mark.parametrize("method", finetune.METHODS)
def test_half_precision_trains_nearly_the_same_and_is_another_step_kept_in_float32(spec, runs, method):
    folders = {name: results.complete(spec(method, precision=name)) for name in finetune.PRECISIONS}
    assert len(set(folders.values())) == 3
    weights = {name: load_file(folder / WEIGHTS[method]) for name, folder in folders.items()}
    assert {value.dtype for found in weights.values() for value in found.values()} == {torch.float32}
    losses = {name: np.load(folder / "losses.npy") for name, folder in folders.items()}
    for name, tolerance in (("bfloat16", 0.05), ("float16", 0.01)):
        assert np.allclose(losses[name], losses["float32"], rtol=tolerance)
        assert not np.array_equal(losses[name], losses["float32"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_loss_goes_down_in_half_precision(spec, trained, pictures, precision):
    asked = spec("dreambooth", steps_per_image=160, batch_size=4, learning_rate=5e-3, precision=precision)
    _, losses = trained(asked, pictures[:1])
    assert losses[-10:].mean() < 0.75 * losses[:5].mean()


@pytest.mark.parametrize("enabled", [False, True])
def test_an_update_is_adamw_on_the_clipped_gradient_whatever_the_scale(enabled):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    for scale in (3.0, 0.05):  # gradients of norm above and below 1
        loss = scale * (parameter * torch.tensor([3.0, 4.0])).sum()
        scaler.scale(loss).backward()
        finetune._step([parameter], optimizer, scaler)
    direction, value, first, second = np.array([0.6, 0.8]), np.array([1.0, -2.0]), 0.0, 0.0
    for step, norm in ((1, 1.0), (2, 0.25)):
        expected = (0.05 * value * [3, 4]).sum()
        first, second = 0.9 * first + 0.1 * norm * direction, 0.999 * second + 0.001 * (norm * direction) ** 2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        value = value * (1 - 0.1 * 0.01) - 0.1 * mean / (np.sqrt(square) + 1e-8)
    assert np.allclose(parameter.detach(), value, atol=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert parameter.grad is None


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_falls():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer, scaler = torch.optim.AdamW([parameter], lr=0.1), torch.amp.GradScaler("cpu", enabled=True)
    scale = scaler.get_scale()
    scaler.scale((parameter * 1e38).sum()).backward()
    finetune._step([parameter], optimizer, scaler)
    assert parameter.item() == 1.0
    assert scaler.get_scale() == scale / 2
    scaler.scale(parameter.sum()).backward()
    finetune._step([parameter], optimizer, scaler)
    assert parameter.item() < 0.91


# protections


def draws_before(spec: FineTune, pictures, latent: tuple[int, ...], step: int) -> None:
    """Draw what a step draws of the batch, so that torch's generator stands where a protection begins to draw."""
    torch.manual_seed(spec.seed * 1_000_003 + step)
    torch.randint(len(pictures), (spec.batch_size,))
    torch.randn(spec.batch_size, *latent)
    torch.randint(T, (spec.batch_size,))
    torch.randn(spec.batch_size, *latent)


@pytest.mark.parametrize("kl_weight", [0.0, 1e-4])
def test_bayesian_training_is_adamw_on_means_and_deviations(spec, fresh64, pictures, tmp_path, kl_weight):
    """A twin with the weights written as mu + sigma * eps, autograd through it, and torch's own divergence."""
    asked = spec("dreambooth", steps_per_image=1, protection=Bayesian(0.02, kl_weight))
    pipeline, trained = fresh64(), fresh64()
    start = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    losses, sigma = finetune.train(trained, pictures, ["a dog"] * 4, asked, tmp_path)
    values = {name: value.clone() for name, value in start.items()}
    values |= {("sigma", name): torch.full_like(start[name], 0.02) for name in sigma}
    text = texts(pipeline, *["a dog"] * 4)

    def loss_at(asked_values, step):
        draws_before(asked, pictures, (4, 4, 4), step)
        weights = {name: value for name, value in asked_values.items() if isinstance(name, str)}
        for name in sigma:
            weights[name] = weights[name] + asked_values["sigma", name] * torch.randn(weights[name].shape).double()
        return twin_loss(pipeline, weights, pictures, text, asked, step)

    def divergence(asked_values, _):
        normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
        parts = (
            kl(normal(asked_values[name], asked_values["sigma", name]), normal(start[name], 0.02)).sum()
            for name in sigma
        )
        return kl_weight * sum(parts)

    expected = twin_descent(values, loss_at, asked, 2, divergence)
    assert np.allclose(losses, expected, rtol=1e-6, atol=0)
    weights = trained.unet.state_dict()
    for name, value in start.items():
        assert torch.allclose(weights[name], values[name], rtol=0, atol=1e-9), name
        assert not torch.equal(weights[name], value), name
    for name in sigma:
        assert torch.allclose(sigma[name], values["sigma", name], rtol=0, atol=1e-9), name
        assert not torch.equal(sigma[name], torch.full_like(sigma[name], 0.02)), name


def test_drawn_are_linear_layers_but_those_of_cross_attention_and_time(spec, fresh, pictures, tmp_path):
    _, sigma = finetune.train(
        fresh(), pictures, ["a dog"] * 4, spec("dreambooth", steps_per_image=1, protection=Bayesian()), tmp_path
    )
    kinds = {name.split("transformer_blocks.0.")[-1] for name in sigma if "transformer_blocks.0." in name}
    assert kinds == {
        *(f"attn1.{part}.weight" for part in PROJECTIONS),
        "attn1.to_out.0.bias",
        *(f"ff.net.{part}.{kind}" for part in ("0.proj", "2") for kind in ("weight", "bias")),
    }
    assert not any(part in name for name in sigma for part in ("time_emb", "conv", "norm", "attn2"))


@pytest.mark.parametrize("method", finetune.METHODS)
def test_a_bayesian_model_is_its_means_on_disk_with_the_deviations_beside(
    spec, runs, fresh, pictures, tmp_path, method
):
    asked, pipeline = spec(method, learning_rate=2e-2, protection=Bayesian(0.05)), fresh()
    folder = results.complete(asked)
    _, sigma = finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path)
    assert equal(load_file(folder / finetune.SIGMA_FILE), sigma)
    assert all((value > 0).all() for value in sigma.values())
    if method == "lora":
        assert sigma
        assert all(".lora_B." in name for name in sigma)
    pair, text = load_tuned(asked), encode(pipeline, "a dog")
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        found = [pair.predict("tuned", x, t, text) for _ in range(2)]
        assert torch.equal(*found), "no draws in generation"
        assert torch.allclose(found[0], denoise(pipeline.unet, x, t, text), atol=1e-5)


def test_every_family_is_fine_tuned_with_every_protection(spec, runs, family):
    """Something else is learned than without, and what is left loads as a model of the family."""
    file = f"{network_name(load_pipeline(family))}/diffusion_pytorch_model.safetensors"
    plain = load_file(results.complete(spec("dreambooth", base=family)) / file)
    for protection in (Bayesian(0.02), PriorPreservation("a cat", 2), NoisyGradients()):
        asked = spec("dreambooth", base=family, protection=protection)
        weights = load_file(results.complete(asked) / file)
        assert plain.keys() == weights.keys(), protection
        assert not equal(plain, weights), protection
        assert all(value.isfinite().all() for value in weights.values()), protection
        load_tuned(asked)
        if isinstance(protection, Bayesian):
            drawn = load_file(results.complete(asked) / finetune.SIGMA_FILE)
            assert not any(part in name for name in drawn for part in ("embedding", "time_emb", "attn2", "add_"))


def test_deviations_never_reach_zero(fresh):
    pipeline = fresh()
    pipeline.unet.requires_grad_(True)
    random = finetune.RandomWeights(pipeline.unet, Bayesian(0.01))
    with torch.no_grad():
        random.sigmas[0].fill_(-1.0)
    random.keep_positive()
    assert (random.sigmas[0] == random.LEAST).all()
    assert (random.sigmas[1] == torch.tensor(0.01)).all()


def test_the_network_holds_its_means_again_after_a_draw_that_failed(fresh):
    pipeline = fresh()
    pipeline.unet.requires_grad_(True)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    random = finetune.RandomWeights(pipeline.unet, Bayesian(0.5))

    def killed_inside():
        with random.drawn():
            assert not equal(pipeline.unet.state_dict(), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_inside()
    assert equal(pipeline.unet.state_dict(), before)


def test_prior_preservation_also_learns_what_the_base_model_draws_for_the_class(spec, fresh64, pictures, tmp_path):
    """A twin that takes the kept latents of the class and adds their loss."""
    prior = PriorPreservation("a cat", images=3, weight=0.5)
    asked, pipeline, trained = spec("dreambooth", steps_per_image=1, protection=prior), fresh64(), fresh64()
    losses, _ = finetune.train(trained, pictures, ["a dog"] * 4, asked, tmp_path)
    known = torch.load(tmp_path / "class.pt", weights_only=True)
    assert known.shape == (3, 4, 4, 4)
    assert known.isfinite().all()
    values = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    of_class = texts(pipeline, "a cat")

    def loss_of_class(asked_values, step):
        draws_before(asked, pictures, (4, 4, 4), step)
        x0 = known[torch.randint(3, (2,))].double()
        t, eps = torch.randint(T, (2,)), torch.randn(2, 4, 4, 4)
        kept = alpha_bar(pipeline)[t].double()[:, None, None, None]
        x = kept.sqrt() * x0 + (1 - kept).sqrt() * eps
        found = twin_noise_prediction(pipeline.unet, asked_values, 0, x, t, of_class.expand(2, -1, -1))
        return 0.5 * ((found - eps) ** 2).mean()

    expected = twin_training(
        pipeline, values, pictures, texts(pipeline, *["a dog"] * 4), asked, steps=2, added=loss_of_class
    )
    assert np.allclose(losses, expected, rtol=1e-6, atol=0)
    for name, value in values.items():
        assert torch.allclose(trained.unet.state_dict()[name], value, rtol=0, atol=1e-9), name


def test_the_images_of_the_class_are_the_base_models_under_its_caption(spec, fresh, pictures, tmp_path):
    """Each owns its seed; with 25 DDIM steps and guidance, written out, the latents are the kept ones."""
    prior = PriorPreservation("a cat", images=2, guidance_scale=2.0)
    pipeline, asked = fresh(), spec("dreambooth", steps_per_image=1, protection=prior)
    finetune.train(fresh(), pictures, ["a dog"] * 4, asked, tmp_path)
    known = torch.load(tmp_path / "class.pt", weights_only=True)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(25)
    text = torch.cat([texts(pipeline, ""), texts(pipeline, "a cat")])
    for number in range(2):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + number)
        x = torch.randn(1, 4, 4, 4, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            with torch.no_grad():
                empty, full = pipeline.unet(torch.cat([x, x]), t, text).sample.chunk(2)
            x = scheduler.step(empty + 2.0 * (full - empty), t, x).prev_sample
        assert torch.allclose(known[number], x[0], atol=1e-4)


def test_noisy_gradients_without_noise_and_clipping_are_those_of_dreambooth(spec, fresh64, pictures, tmp_path):
    weights, losses = [], []
    for protection in (None, NoisyGradients(clip=1e9, noise=0.0)):
        pipeline = fresh64()
        (folder := tmp_path / str(len(weights))).mkdir()
        asked = spec("dreambooth", steps_per_image=1, protection=protection)
        losses.append(finetune.train(pipeline, pictures, ["a dog"] * 4, asked, folder)[0])
        weights.append(pipeline.unet.state_dict())
    assert np.allclose(*losses, rtol=1e-6, atol=0)
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-9) for name in weights[0])


def test_each_images_gradient_is_clipped_and_noise_of_the_given_size_is_added():
    """Gradients known in closed form: row i of the loss is <v_i, w>, whose gradient is v_i."""
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, -2.0], [0.0, 0.0]])
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def gradient(noise: float, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        loss = finetune._noisy_backward(
            lambda rows: (vectors[rows] @ weight).mean(), 4, [weight], NoisyGradients(1.0, noise), scaler
        )
        assert loss == pytest.approx(((vectors @ weight.detach()).mean()).item())
        return weight.grad

    assert torch.allclose(
        gradient(0.0), (torch.tensor([0.6, 0.8]) + torch.tensor([0.3, 0.4]) - torch.tensor([0, 1.0])) / 4
    )
    added = torch.stack([gradient(2.0, seed) - gradient(0.0) for seed in range(500)])
    assert abs(added.mean()) < 0.1
    assert added.std().item() == pytest.approx(2.0 / 4, rel=0.12)


@pytest.mark.parametrize(
    "protection", [Bayesian(0.05, 1e-5), PriorPreservation("a cat", 2), NoisyGradients()], ids=repr
)
@pytest.mark.parametrize("method", finetune.METHODS)
def test_protected_training_is_fixed_by_the_seed_and_goes_on_where_it_was_killed(
    spec, fresh, pictures, tmp_path, monkeypatch, method, protection
):
    asked, pipelines = spec(method, protection=protection), [fresh(), fresh()]
    places = [tmp_path / "whole", tmp_path / "killed"]
    for place in places:
        place.mkdir()
    whole = finetune.train(pipelines[0], pictures, ["a dog"] * 4, asked, places[0])
    real = finetune.tqdm

    def until_killed(steps, *_, **__):
        yield from range(steps.start, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(finetune, "tqdm", until_killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.train(fresh(), pictures, ["a dog"] * 4, asked, places[1])
    monkeypatch.setattr(finetune, "tqdm", real)
    again = finetune.train(pipelines[1], pictures, ["a dog"] * 4, asked, places[1])
    assert np.array_equal(whole[0], again[0])
    assert equal(whole[1], again[1])
    assert equal(*(pipeline.unet.state_dict() for pipeline in pipelines))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bayesian(0.0), "sigma 0.0 must lie between 0 and 1"),
        (lambda: Bayesian(0.01, -1.0), "kl_weight -1.0 be at least 0"),
        (lambda: PriorPreservation("a dog", 0), "images 0 and guidance_scale 3.0 must be at least 1"),
        (lambda: PriorPreservation("a dog", 5, 0.0), "weight 0.0 above 0"),
        (lambda: PriorPreservation("a dog", 5, float("nan")), "weight nan above 0"),
        (lambda: PriorPreservation("a dog", guidance_scale=0.5), "guidance_scale 0.5 must be at least 1"),
        (lambda: NoisyGradients(float("nan")), "clip nan must be above 0"),
        (lambda: NoisyGradients(0.0), "clip 0.0 must be above 0"),
        (lambda: NoisyGradients(1.0, -0.1), "noise -0.1 at least 0"),
    ],
)
def test_impossible_protections_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_caption_that_is_too_long_is_refused_before_any_work(spec, runs):
    with pytest.raises(ValueError, match="has 32 tokens, the text encoder reads at most 16"):
        results.complete(spec("lora", protection=PriorPreservation("dog " * 30)))


def test_a_protection_is_part_of_the_address_and_none_leaves_it_as_it_was(spec):
    plain = spec("dreambooth")
    digests = {
        results.digest(replace(plain, protection=p)) for p in (None, Bayesian(), Bayesian(0.02), NoisyGradients())
    }
    assert len(digests) == 4
    assert "protection" not in results._asked(plain)["spec"]["fields"]


# other adapters, and text encoders that learn too

RELATIVES = [
    ("dreambooth", {"text_encoder": True}),
    ("lora", {"text_encoder": True}),
    ("lora", {"adapter": "dora"}),
    ("lora", {"adapter": "loha"}),
    ("lora", {"adapter": "dora", "text_encoder": True}),
    ("lora", {"adapter": "loha", "text_encoder": True}),
]


@pytest.mark.parametrize("captions", [["a dog"] * 4, ["a dog", "a cat", "a cat", "a dog"]], ids=["one", "two"])
def test_a_text_encoder_learns_by_the_same_adamw_as_the_network(spec, fresh64, pictures, tmp_path, captions):
    """Every one of its weights, and both in the same clipping of gradients."""
    asked = spec("dreambooth", steps_per_image=1, text_encoder=True)
    twin, pipeline, before = fresh64(), fresh64(), fresh64().text_encoder.state_dict()
    values = {name: value.detach().clone() for name, value in twin.unet.named_parameters()}
    values |= {f"text:{name}": value.detach().clone() for name, value in twin.text_encoder.named_parameters()}
    tokens = twin.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids

    def loss_at(asked_values, step):
        of_text = {n.removeprefix("text:"): v for n, v in asked_values.items() if n.startswith("text:")}
        text = functional_call(twin.text_encoder, of_text, (tokens,))[0]
        of_network = {name: value for name, value in asked_values.items() if not name.startswith("text:")}
        return twin_loss(twin, of_network, pictures, text, asked, step)

    expected = twin_descent(values, loss_at, asked, steps=2)
    losses, _ = finetune.train(pipeline, pictures, captions, asked, tmp_path)
    assert np.allclose(losses, expected, rtol=1e-6, atol=0)
    found = pipeline.unet.state_dict() | {f"text:{n}": v for n, v in pipeline.text_encoder.state_dict().items()}
    for name, value in values.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-9), name
    moved = [name for name in before if not torch.equal(found[f"text:{name}"], before[name])]
    assert set(moved) == {name for name, _ in pipeline.text_encoder.named_parameters()}


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize(("method", "options"), RELATIVES, ids=[f"{m} {list(o.values())}" for m, o in RELATIVES])
def test_what_others_publish_predicts_from_disk_what_was_trained(spec, runs, pictures, tmp_path, kind, method, options):
    """Networks and text encoders, alpha 6 at rank 2 included; theta stays as it was, its text encoders too."""
    base = str(tiny.save(kind, tmp_path / kind))
    asked, pipeline, untouched = spec(method, base=base, learning_rate=2e-2, **options), *map(load_pipeline, [base] * 2)
    (tmp_path / "scratch").mkdir()
    finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path / "scratch")
    pair = load_tuned(asked)
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        for model, twin in (("tuned", pipeline), ("base", untouched)):
            told, text = pair.condition(model, "a dog"), encode(twin, "a dog")
            assert torch.allclose(told.text, text.text, atol=1e-5)
            assert torch.allclose(pair.predict(model, x, t, told), denoise(network(twin), x, t, text), atol=1e-4)
        learned = [pair.condition(model, "a dog").text for model in ("base", "tuned")]
        found = [pair.predict(model, x, t, pair.condition("base", "a dog")) for model in ("base", "tuned")]
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert ((learned[0] - learned[1]).abs().max() > 1e-3) == ("text_encoder" in options)


def test_a_loha_is_in_lycoris_layout_and_is_the_product_of_two_of_its_rank(spec, runs, fresh, pictures, tmp_path):
    asked = spec("lora", adapter="loha", learning_rate=2e-2)
    tensors, before = load_file(results.complete(asked) / LORA_FILE), fresh().unet
    after = load_tuned(asked).tuned.unet
    names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    assert len(names) == len([n for n, _ in before.named_modules() if n.endswith(PROJECTIONS)])
    for path, module in before.named_modules():
        if path.endswith(PROJECTIONS):
            parts = [tensors[f"lora_unet_{path.replace('.', '_')}.hada_w{i}_{ab}"] for i in (1, 2) for ab in "ab"]
            added = (parts[0] @ parts[1]) * (parts[2] @ parts[3]) * 6 / 2
            assert torch.allclose(after.get_submodule(path).weight, module.weight + added, atol=1e-6)
            assert added.abs().max() > 1e-6
            assert tensors[f"lora_unet_{path.replace('.', '_')}.alpha"] == 6


@pytest.mark.parametrize("method", finetune.METHODS)
def test_learning_text_encoders_go_on_where_they_were_killed(spec, fresh, pictures, tmp_path, monkeypatch, method):
    asked, real, found = spec(method, text_encoder=True), finetune.tqdm, []

    def run(scratch: str):
        (tmp_path / scratch).mkdir(exist_ok=True)
        pipeline = fresh()
        pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)
        finetune.train(pipeline, pictures, ["a dog"] * 4, asked, tmp_path / scratch)
        return pipeline.unet.state_dict() | {f"text:{n}": v for n, v in pipeline.text_encoder.state_dict().items()}

    def until_killed(steps, *_, **__):
        for step in steps:
            if step == 4:
                raise KeyboardInterrupt
            yield step

    found.append(run("whole"))
    monkeypatch.setattr(finetune, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(finetune, "tqdm", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(finetune, "tqdm", real)
    found.append(run("killed"))
    assert equal(*found)


def test_what_came_later_leaves_older_addresses_as_they_were(spec):
    plain = spec("lora")
    assert not {"adapter", "text_encoder"} & set(results._asked(plain)["spec"]["fields"])
    changed = [plain, replace(plain, adapter="dora"), replace(plain, adapter="loha"), replace(plain, text_encoder=True)]
    assert len({results.digest(each) for each in changed}) == 4


@pytest.mark.parametrize("kind", ["alt", "sd3", "flux"])
def test_text_encoders_that_are_not_fine_tuned_are_named_before_any_work(spec, runs, tmp_path, kind):
    asked = spec("lora", base=str(tiny.save(kind, tmp_path / kind)), text_encoder=True)
    with pytest.raises(ValueError, match=r"the text encoders of .* are not fine-tuned here: leave text_encoder out"):
        results.run([asked])
    assert not runs.exists()


# addresses and refusals


def test_the_digest_follows_images_caption_and_base_model(spec, picture_folder, tiny_sd, tmp_path):
    images, base = tmp_path / "images", tmp_path / "base"
    shutil.copytree(picture_folder, images)
    shutil.copytree(tiny_sd, base)

    def asked(caption="a dog", **options) -> str:
        return results.digest(
            spec("dreambooth", training=(TrainingItem(str(images), caption),), base=str(base), **options)
        )

    digests = [asked(), asked(caption="a cat"), asked(seed=6), asked(precision="bfloat16")]
    with Image.open(images / "2.png") as image:
        image.rotate(180).save(images / "2.png")
    digests.append(asked())
    (images / "3.png").unlink()
    digests.append(asked())
    weights = base / WEIGHTS["dreambooth"]
    assert load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    digests.append(asked())
    assert len(set(digests)) == len(digests)
    assert digests[-1] == asked()


def test_the_digest_follows_the_caption_that_a_shipped_item_brings_along(spec, monkeypatch):
    asked = spec("dreambooth", training=(TrainingItem("style/mimooh"),))
    item, digests = load_item("style/mimooh", "one"), []
    for caption in ("one", "two"):
        monkeypatch.setattr(finetune, "load_item", lambda *_, caption=caption: replace(item, caption=caption))
        digests.append(results.digest(asked))
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dreambooth", {"method": "full"}, "unknown method 'full': choose from dreambooth, lora"),
        ("dreambooth", {"rank": 2}, "rank 2 and alpha 0: LoRA needs both above 0, DreamBooth both 0"),
        ("dreambooth", {"alpha": 2}, "rank 0 and alpha 2"),
        ("lora", {"rank": 0}, "rank 0 and alpha 6"),
        ("lora", {"alpha": 0}, "rank 2 and alpha 0"),
        ("lora", {"rank": -1}, "rank -1 and alpha 6"),
        ("lora", {"transform": "blur"}, "unknown transform 'blur': choose from none, cutout, randaugment"),
        ("lora", {"transform": "cutout:2"}, "'cutout:2': the strength of cutout is a number from 0.01 to 1"),
        ("lora", {"transform": "cutout:half"}, "'cutout:half': the strength of cutout is a number from 0.01 to 1"),
        ("lora", {"transform": "randaugment:9.5"}, "the strength of randaugment is a whole number from 0 to 30"),
        ("lora", {"protection": "bayesian"}, "protection 'bayesian' must be None, Bayesian, PriorPreservation or"),
        ("lora", {"steps_per_image": 0}, "steps_per_image 0 and batch_size 2 must be at least 1"),
        ("lora", {"batch_size": 0}, "batch_size 0 must be at least 1"),
        ("lora", {"learning_rate": 0.0}, "learning_rate 0.0 between 0 and 1"),
        ("lora", {"learning_rate": 1.0}, "learning_rate 1.0 between 0 and 1"),
        ("lora", {"seed": -1}, "seed -1 must be at least 0"),
        ("lora", {"learning_rate": float("nan")}, "learning_rate nan between 0 and 1"),
        ("lora", {"precision": "fp16"}, "unknown precision 'fp16': choose from float32, bfloat16, float16"),
        ("lora", {"adapter": "lokr"}, "unknown adapter 'lokr': choose from lora, dora, loha"),
        ("dreambooth", {"adapter": "dora"}, "the adapter dora takes the place of a LoRA without random weights"),
        ("lora", {"adapter": "loha", "protection": Bayesian()}, "the adapter loha takes the place of a LoRA without"),
        ("lora", {"training": ()}, "training is empty: name at least one TrainingItem"),
        ("lora", {"training": "style/mimooh"}, "training 'style/mimooh' must be a tuple of TrainingItem"),
        ("lora", {"training": TrainingItem("style/mimooh")}, "must be a tuple of TrainingItem"),
        ("lora", {"training": ("style/mimooh",)}, "must be a tuple of TrainingItem"),
    ],
)
def test_impossible_specs_are_refused(spec, method, options, message):
    with pytest.raises(ValueError, match=message):
        spec(method, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"item": "style/nobody"}, FileNotFoundError, "neither a folder of images nor a shipped item"),
        ({"caption": None}, ValueError, "needs a caption"),
        ({"base": "no-sd"}, FileNotFoundError, "unknown model 'no-sd'"),
        ({"caption": "dog " * 30}, ValueError, "has 32 tokens, the text encoder reads at most 16"),
        ({"first": 5}, ValueError, "has 4 training images: first is 1 to 4, not 5"),
    ],
)
def test_a_wrong_item_caption_or_model_is_refused_before_any_work(spec, runs, changes, error, message):
    right = spec("lora")
    base = changes.get("base", right.base)
    part = replace(right.training[0], **{name: value for name, value in changes.items() if name != "base"})
    wrong = replace(right, base=base, training=(right.training[0], part))  # what is wrong comes second
    with pytest.raises(error, match=message):
        results.run([spec("lora"), wrong])
    assert not runs.exists()  # the first spec of the list was not begun either
