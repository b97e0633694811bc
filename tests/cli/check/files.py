"""Writes checkpoints of headers: their weights are holes in the files."""

import json
from pathlib import Path

from vllm_patch.cli.check import derived, quantization
from vllm_patch.cli.check.checkpoint import INDEX, Tensor


def write(folder: Path, fields: dict, shards: int = 1, apart: bool = False) -> Path:
    """Write config.json and safetensors of a model, without its weights' bytes.

    Args:
        folder: New.
        fields: Its config.json.
        shards: Files; with an index if more than one.
        apart: Experts as published: three tensors for each, with scales.

    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = tensors_of(fields)
    if apart:
        tensors = dict(pair for name in tensors for pair in _apart(name, tensors[name]))
    names = sorted(tensors)
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    placed = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        placed |= dict.fromkeys(mine, file)
        write_file(folder / file, {name: tensors[name] for name in mine})
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


def tensors_of(fields: dict) -> dict[str, Tensor]:
    return derived.tensors(fields, quantization.read(fields, "")).tensors


def write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        place = [offset, offset + tensor.bytes]
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        offset = place[1]
    text = json.dumps(entries).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + offset)


def _apart(name: str, tensor: Tensor):
    """Yield the tensors of single experts for one that holds all of them."""
    if ".experts." not in name:
        yield name, tensor
        return
    parent, _, rest = name.partition(".experts.")
    leaf, _, what = rest.partition(".")
    experts, rows, columns = tensor.shape
    parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
    for expert in range(experts):
        for part in parts:
            shape = rows // len(parts), columns
            yield (
                f"{parent}.experts.{expert}.{part}.{what}",
                Tensor(tensor.dtype, shape, ""),
            )
