"""What is read of a checkpoint, and what is said of a damaged one."""

import json

import pytest

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import checkpoint
from vllm_patch.cli.check.checkpoint import INDEX, Tensor

from . import files
from .known_models import config


@pytest.fixture
def folder(tmp_path):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2, "num_experts": 4}
    return files.write(tmp_path / "model", fields, shards=3, apart=True)


def test_a_folder(folder):
    found = checkpoint.read(str(folder))
    # Per layer q, k, v, o and 3 tensors for each expert, each with scales.
    assert len(found.tensors) == 2 * 2 * (4 + 3 * 4)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensor = found.tensors[name]
    assert (tensor.dtype, tensor.shape) == ("F8_E4M3", (2048, 768))
    assert found.fields["num_experts"] == 4


def test_a_folder_without_weights_is_its_config(folder):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    assert checkpoint.read(str(folder)).tensors is None


def test_files_that_the_index_does_not_name_are_left_out(folder):
    """Such as consolidated.safetensors, a second copy in another layout."""
    files.write_file(
        folder / "consolidated.safetensors", {"x": Tensor("F32", (1,), "")}
    )
    assert "x" not in checkpoint.read(str(folder)).tensors


def test_a_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UsageError, match="00002-of-00003.* is missing, and .*index"):
        checkpoint.read(str(folder))


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "../b.safetensors"}])
def test_an_index_that_is_none(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UsageError, match="has no weight_map of file names"):
        checkpoint.read(str(folder))


def test_a_tensor_in_two_files(folder):
    (folder / INDEX).unlink()
    first = folder / "model-00001-of-00003.safetensors"
    (folder / "copy.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match="is in copy.safetensors and in model-00001"):
        checkpoint.read(str(folder))


def header_of(entries, length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + bytes(64)


FINE = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes and a header of 0"),
        (b"\x01\x00", "has 2 bytes and a header"),
        (header_of({}, 2**63), "a header of 9223372036854775808"),
        (header_of({"a": FINE})[:-40], "does not fit in 24 bytes of weights"),
        (header_of({"a": FINE})[:30], "bytes and a header of"),
        (header_of(b"{"), "s header: Expecting property name"),
        (header_of(b"\xff\xfe{}"), "s header: "),
        (header_of(b"[" * 90000 + b"]" * 90000), "s header: "),
        (header_of(b"[]"), "s header holds no JSON object"),
        (header_of({"a": []}), r"says of a \[\], which cannot be"),
        (header_of({"a": {**FINE, "shape": [-4, -4]}}), r"\[-4, -4\]"),
        (header_of({"a": {**FINE, "shape": [4, 4.0]}}), "which cannot be"),
        (header_of({"a": {**FINE, "shape": [4, True]}}), "which cannot be"),
        (header_of({"a": {**FINE, "shape": [float("nan")]}}), "which cannot be"),
        (header_of({"a": {**FINE, "shape": [2**70]}}), "which cannot be"),
        (header_of({"a": {**FINE, "data_offsets": [64, 0]}}), "does not fit"),
        (header_of({"a": {**FINE, "data_offsets": [0, 60]}}), "which cannot be"),
        (header_of({"a": {**FINE, "dtype": 3}}), "which cannot be"),
    ],
)
def test_a_damaged_file(tmp_path, content, message):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        checkpoint.read(str(tmp_path))
    assert "download" in str(raised.value).lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "Expecting property name"),
        (b"[]", "holds no JSON object"),
        (b'{"added_tokens": []}', "neither architectures nor model_type"),
        (b"[" * 90000, "recursion"),
        (b"\xff\xff", "decode"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        checkpoint.read(str(tmp_path))
    assert "Give the config.json of a model" in str(raised.value)


def test_a_config_without_end(tmp_path):
    with (tmp_path / "config.json").open("wb") as opened:
        opened.truncate(65 << 20)
    with pytest.raises(UsageError, match="has over 64 MiB"):
        checkpoint.read(str(tmp_path))


def test_what_is_nothing():
    with pytest.raises(UsageError, match="no folder, no file and no hub id such as"):
        checkpoint.read("no/such/folder")
