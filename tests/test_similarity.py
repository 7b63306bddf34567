"""The descriptor network and the similarity matrix against plain twins."""

import hashlib
import json
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models.resnet import BasicBlock as ReferenceBlock
from torchvision.transforms.functional import to_pil_image

from fx import similarity
from fx.datasets import load_images
from fx.similarity import (
    BasicBlock,
    MiniSSCD,
    copy_thresholds,
    descriptor_path,
    descriptors,
    load_descriptor,
    similarity_matrix,
)


def tiny(seed=0):
    """A MiniSSCD of a few thousand weights whose normalisation statistics are not the initial ones."""
    torch.manual_seed(seed)
    model = MiniSSCD(widths=(4, 6), blocks=(1, 2), dimension=5, size=16)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(8, 3, 16, 16) * 2 - 1)
    return model.eval()


def pictures(n, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 6, 2), (4, 6, 1)])
def test_block_equals_torchvisions_basic_block(inputs, outputs, stride):
    block = BasicBlock(inputs, outputs, stride)
    plain = stride == 1 and inputs == outputs
    twin = ReferenceBlock(inputs, outputs, stride, None if plain else block.shortcut)
    twin.load_state_dict(
        {
            name.replace("norm", "bn").replace("shortcut", "downsample"): tensor
            for name, tensor in block.state_dict().items()
        }
    )
    x = torch.randn(3, inputs, 8, 8)
    torch.testing.assert_close(block.eval()(x), twin.eval()(x))


def test_default_network_has_the_stated_size_and_resolution():
    model = MiniSSCD()
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    with torch.no_grad():
        features = model.stages(model.stem(pictures(2, 64)))
        assert features.shape == (2, 192, 4, 4)
        assert model(pictures(2, 64)).shape == (2, 128)


def test_head_is_cubic_mean_then_linear_then_unit_length():
    model, images = tiny(), pictures(3)
    with torch.no_grad():
        features = model.stages(model.stem(images)).double()
        pooled = (features.clamp(min=1e-6) ** 3).sum(dim=(2, 3)).div(features[0, 0].numel()) ** (1 / 3)
        expected = pooled @ model.project.weight.double().T + model.project.bias.double()
        expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model(images).double(), expected, atol=1e-5, rtol=0)


def test_other_sizes_are_resized_with_antialiasing():
    model = tiny()
    checks = torch.ones(1, 3, 64, 64)
    checks[..., ::2] = -1  # averages to grey, which subsampling without antialiasing would miss
    with torch.no_grad():
        grey, striped = model(torch.zeros(1, 3, 16, 16)), model(checks)
        assert float((grey * striped).sum()) == pytest.approx(1, abs=1e-3)
        wide = F.interpolate(pictures(1, 48)[..., :32], size=(16, 16), mode="bilinear", antialias=True)
        torch.testing.assert_close(model(pictures(1, 48)[..., :32]), model(wide))


def test_stored_network_comes_back_in_half_precision_and_eval_mode(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "net" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16, torch.int64}
    loaded = MiniSSCD.from_pretrained(tmp_path / "net")
    assert not loaded.training
    assert loaded.config == model.config
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(pictures(4)), model(pictures(4)), atol=5e-3, rtol=0)
    loaded.save_pretrained(tmp_path / "again")  # rounding to half precision happens once
    again = MiniSSCD.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.state_dict().items())


def test_load_descriptor_by_name_and_by_folder(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "mini-sscd")
    monkeypatch.setattr(similarity, "MODELS", tmp_path)
    by_name, by_folder = load_descriptor("mini-sscd"), load_descriptor(tmp_path / "mini-sscd")
    with torch.no_grad():
        assert torch.equal(by_name(pictures(2)), by_folder(pictures(2)))


def test_thresholds_are_stored_with_the_network(tmp_path):
    tiny().save_pretrained(tmp_path / "with", {"loose": 0.4, "strict": 0.55})
    assert copy_thresholds(tmp_path / "with") == (0.4, 0.55)
    assert load_descriptor(tmp_path / "with").config == tiny().config
    tiny().save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="without' was saved without thresholds"):
        copy_thresholds(tmp_path / "without")


def test_what_is_no_descriptor_is_refused_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="unknown descriptor 'sscd2'"):
        load_descriptor("sscd2")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        MiniSSCD.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "UNet2DConditionModel"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="does not describe a MiniSSCD"):
        load_descriptor(tmp_path)


class Averages(torch.nn.Module):
    """In place of SSCD's network: averages over a grid of 4 x 4, so that resizing, cropping and normalisation show."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x * self.weight, 4).flatten(1)


@pytest.fixture
def torchscript(tmp_path):
    """A TorchScript file and its digest."""
    path = tmp_path / "sscd.torchscript.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(Averages()).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("preset", "twin"),
    [
        (
            "sscd",
            [
                transforms.Resize(288),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ],
        ),
        (
            "published",
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ],
        ),
    ],
)
def test_torchscript_sees_images_as_a_user_of_sscd_would_prepare_them(torchscript, preset, twin):
    path, digest = torchscript
    image = F.interpolate(pictures(1, 9), size=(96, 120), mode="bicubic").clamp(-1, 1)
    image = ((image + 1) * 127.5).round() / 127.5 - 1  # a picture of 8 bits
    network = load_descriptor(f"{path}@sha256:{digest.upper()}", preset)
    prepared = transforms.Compose(twin)(to_pil_image(((image[0] + 1) * 127.5).round().byte()))
    expected = F.normalize(Averages()(prepared[None])).detach().numpy()
    np.testing.assert_allclose(descriptors(network, image), expected, atol=5e-4)  # Pillow rounds when it resizes
    assert not network.training
    assert copy_thresholds(f"{path}@sha256:{digest}") == (0.6, 0.7)


def test_a_digest_beside_the_file_counts_as_one_in_its_name(torchscript, monkeypatch):
    path, digest = torchscript
    beside = path.with_name(f"{path.name}.sha256")
    beside.write_text(f"{digest}  {path.name}\n")
    assert descriptor_path(path) == (path, digest)
    monkeypatch.setattr(similarity, "EXTERNAL", path.parent)
    assert descriptor_path(path.name) == (path, digest)
    assert copy_thresholds(path.name) == (0.6, 0.7)
    beside.write_text("0" * 64)
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not {'0' * 64}"):
        load_descriptor(path)
    for nothing in ("", "text"):
        beside.write_text(nothing)
        with pytest.raises(ValueError, match=f"or write that into {beside.name} beside it"):
            load_descriptor(path)


def test_torchscript_is_a_program_and_taken_by_its_digest_only(torchscript, tmp_path):
    path, digest = torchscript
    with pytest.raises(ValueError, match=f"name it with the SHA-256 you expect.*The file has {digest}"):
        load_descriptor(path)
    with pytest.raises(ValueError, match="name it with the SHA-256"):
        load_descriptor(f"{path}@sha256:{digest[:-1]}")
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not {'0' * 64}"):
        load_descriptor(f"{path}@sha256:{'0' * 64}")
    with pytest.raises(ValueError, match="unknown preset 'sscd2': choose one of sscd, published"):
        load_descriptor(f"{path}@sha256:{digest}", "sscd2")
    with pytest.raises(FileNotFoundError, match="neither 'mini-sscd' nor a folder"):
        load_descriptor(f"{path}x@sha256:{digest}")
    (tmp_path / "no.pt").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no\.pt is not a TorchScript file"):
        load_descriptor(f"{tmp_path / 'no.pt'}@sha256:{hashlib.sha256(b'text').hexdigest()}")


def test_descriptors_are_unit_rows_and_do_not_depend_on_batches_or_mode():
    model, images = tiny(), pictures(13)
    found = descriptors(model, images)
    assert found.shape == (13, 5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images).numpy(), atol=1e-5)
    model.train()
    np.testing.assert_allclose(descriptors(model, images, batch_size=4), found, atol=1e-5)
    assert model.training
    with pytest.raises(ValueError, match=r"\[n, 3, h, w\], not \[13, 1, 16, 16\]"):
        descriptors(model, images[:, :1])


@pytest.fixture
def files(tmp_path):
    """Thirteen image files of 16 px, and what they show, float32 [13, 3, 16, 16]."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3)).astype(np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(13)]
    for path, picture in zip(paths, pixels, strict=True):
        to_pil_image(picture).save(path)
    return paths, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("batch_size", [1, 5, 13, 64])
def test_describe_is_descriptors_of_all_images_and_reads_no_more_than_a_batch_at_a_time(files, batch_size, monkeypatch):
    paths, images = files
    read, known, alive = similarity.load_images, [], []

    def watched(some, side):
        alive.append(sum(batch() is not None for batch in known))
        batch = read(some, side)
        known.append(weakref.ref(batch))
        alive[-1] += 1
        assert len(some) <= batch_size
        return batch

    monkeypatch.setattr(similarity, "load_images", watched)
    found = similarity.describe(tiny(), paths, batch_size=batch_size)
    assert (found.shape, found.dtype) == ((13, 5), np.float32)
    np.testing.assert_allclose(found, descriptors(tiny(), images), atol=1e-6)
    assert len(known) == -(-13 // batch_size)
    assert max(alive) == 1, "one batch is gone before the next is read"


def test_describe_takes_images_as_they_are_or_cropped_to_squares(files, tmp_path):
    paths, images = files
    wide = torch.cat([images, images.flip(3)], dim=3)
    for number, picture in enumerate(((wide + 1) * 127.5).round().byte()):
        to_pil_image(picture).save(tmp_path / f"wide{number}.png")
    cropped = similarity.describe(tiny(), [tmp_path / f"wide{number}.png" for number in range(13)], size=16)
    np.testing.assert_allclose(cropped, descriptors(tiny(), wide[..., 8:24]), atol=1e-6)
    small = similarity.describe(tiny(), paths, size=8)
    np.testing.assert_allclose(small, descriptors(tiny(), load_images(tuple(paths), 8)), atol=1e-6)
    assert np.abs(small - similarity.describe(tiny(), paths)).max() > 1e-3
    with pytest.raises(ValueError, match="no images to describe"):
        similarity.describe(tiny(), [])


def test_a_descriptor_lies_on_the_device_that_the_models_use(tmp_path, monkeypatch, torchscript):
    tiny().save_pretrained(tmp_path / "net")
    monkeypatch.setattr(similarity, "device", lambda: torch.device("meta"))
    assert next(load_descriptor(tmp_path / "net").parameters()).is_meta
    path, digest = torchscript
    moved = []
    monkeypatch.setattr(similarity.SSCD, "to", lambda self, place: moved.append(place) or self)
    load_descriptor(f"{path}@sha256:{digest}")
    assert moved == [torch.device("meta")]


@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 50))
@settings(max_examples=40)
def test_similarity_equals_pairwise_cosine_in_any_blocks(n, block, seed):
    rows = np.random.default_rng(seed).standard_normal((n, 6)).astype(np.float32)
    found = similarity_matrix(rows, block)
    twin = F.cosine_similarity(torch.tensor(rows)[:, None], torch.tensor(rows)[None], dim=-1).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, twin, atol=1e-5)
    assert np.array_equal(found, found.T)
    assert (np.diag(found) == 1).all()
    assert np.abs(found).max() <= 1


def test_similarity_of_duplicates_and_opposites():
    rows = np.array([[3, 4], [3, 4], [-6, -8], [4, -3]], dtype=np.float32)
    expected = np.array([[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(similarity_matrix(rows, block=3), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_rows_without_direction_are_refused(bad):
    rows = np.ones((4, 3), dtype=np.float32)
    rows[2] = bad
    with pytest.raises(ValueError, match="Descriptor 2 is all zero or not finite"):
        similarity_matrix(rows)


def test_similarities_do_not_depend_on_where_a_block_ends():
    rows = np.random.default_rng(0).standard_normal((65, 512)).astype(np.float32)
    order = np.random.default_rng(1).permutation(65)
    expected = similarity_matrix(rows, block=64)  # a last block of one row
    assert np.array_equal(similarity_matrix(rows[order], block=64), expected[np.ix_(order, order)])
    assert np.array_equal(similarity_matrix(rows, block=1), expected)


@pytest.mark.parametrize(
    ("rows", "block", "message"),
    [(np.ones(3), 4, r"\[n, d\].*\[3\], block 4"), (np.ones((2, 2, 2)), 4, r"\[2, 2, 2\]"), (np.eye(2), 0, "block 0")],
)
def test_what_is_no_list_of_descriptors_is_refused(rows, block, message):
    with pytest.raises(ValueError, match=message):
        similarity_matrix(rows, block)


def test_lengths_far_from_one_are_lengths():
    assert similarity_matrix(np.array([[1e30, 0], [1e-30, 1e-30]]))[0, 1] == pytest.approx(0.5**0.5)


def test_an_error_in_the_network_leaves_its_modes_as_they_were():
    network = MiniSSCD().train()
    network.stem.eval()
    for images, message in (
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.zeros(0, 3, 8, 8), "one"),
    ):
        with pytest.raises(ValueError, match=message):
            descriptors(network, images)
    network.forward = None  # fails when called
    with pytest.raises(TypeError):
        descriptors(network, torch.zeros(1, 3, 8, 8))
    assert network.training
    assert not network.stem.training
