"""What others wrote, changed at random: every parser of ours gives a right result or one message, and runs nothing of it."""

import argparse
import io
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fx import provenance, results, runs
from fx import settings as fx_settings
from fx.datasets import open_image
from fx.inspect import as_json, as_text, inspect
from fx.reproduce import assignment

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)

# safetensors: the header's length, its entries and what it says of itself

names = st.sampled_from(["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha", "x"])
sizes = st.integers(-(2**65), 2**65) | st.integers(0, 64)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "", "X"]) | values,
        "shape": st.lists(sizes, max_size=4) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)
metadata = st.dictionaries(
    st.sampled_from(
        ["ss_tag_frequency", "ss_network_dim", "ss_base_model_version", "modelspec.title", "ss_bucket_info"]
    ),
    st.text(max_size=20) | st.sampled_from(["{", '{"a": {"b": 1}}', "[1]", "<script>alert(1)</script>", "NaN"]),
    max_size=4,
)
headers = st.dictionaries(names, entries | values, max_size=4) | st.fixed_dictionaries(
    {"__metadata__": metadata | values, "lora_unet_a.lora_down.weight": entries}
)


@FUZZ
@given(header=headers | values, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
def test_safetensors(header, length, data, tmp_path):
    text = json.dumps(header).encode()
    (file := tmp_path / "lora.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )
    found = inspect(str(file))
    assert all(isinstance(trouble, str) and trouble for trouble in found.troubles)
    assert as_text(found)
    json.loads(as_json(found))


# images


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")}


@FUZZ
@given(
    kind=st.sampled_from(sorted(PICTURES)),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    cut=st.none() | st.integers(0, 400),
)
def test_images(kind, changes, cut, tmp_path):
    content = bytearray(PICTURES[kind])
    for place, value in changes:
        content[place % len(content)] = value
    (file := tmp_path / f"picture.{kind.lower()}").write_bytes(content[:cut])
    with warnings.catch_warnings(action="ignore"):
        try:
            image = open_image(file)
        except ValueError as error:
            told = str(error)
        else:
            told = f"{file} {image.mode}"
    assert str(file) in told
    assert told.endswith(("RGB", "remove or replace it"))


# what the runner reads again


@FUZZ
@given(content=values.map(json.dumps).map(str.encode) | st.binary(max_size=40))
def test_manifests(content, tmp_path):
    step = tmp_path / "sum" / ("a" * 16)
    step.mkdir(parents=True, exist_ok=True)
    (step / results.MANIFEST).write_bytes(content)
    assert runs.fault_of(step)


@FUZZ
@given(known=values | st.fixed_dictionaries({"files": st.dictionaries(st.just("t.csv"), values), "steps": values}))
def test_records_of_what_a_table_was_made_from(known, tmp_path):
    (table := tmp_path / "t.csv").write_text("a\n1\n")
    (tmp_path / provenance.NAME).write_text(json.dumps(known))
    with pytest.raises(ValueError, match="nothing was noted"):
        provenance.of(table)
    provenance.note(table, tmp_path)
    assert provenance.of(table).unchanged


# words on the command line and in parameter files


@FUZZ
@given(change=st.text(max_size=30) | st.sampled_from(["seed=!!python/object:os.system", "base='", "lora.rank=1e3"]))
def test_changes_of_settings(change):
    try:
        chosen = fx_settings.load("mini-sd", change)
    except ValueError:
        return
    assert chosen


@FUZZ
@given(text=st.text(max_size=30).map("n=".__add__) | st.text(max_size=10))
def test_parameters(text):
    try:
        name, value = assignment(text)
    except argparse.ArgumentTypeError:
        return
    assert name.isidentifier()
    assert type(value).__module__ in ("builtins", "datetime"), "plain values and no other objects"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch fuzzed']", "!!python/name:os.system", "!x 1"])
def test_a_parameter_that_asks_for_python_is_refused(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="is not YAML"):
        assignment(f"n={tag}")
    assert not Path("fuzzed").exists()
