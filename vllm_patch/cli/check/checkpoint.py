# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's config.json and headers of safetensors, without its weights."""

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patch.cli import UsageError

INDEX = "model.safetensors.index.json"
# Where ModelOpt says what vLLM looks for in config.json first.
MODELOPT = "hf_quant_config.json"
# Far above what any model has: beyond, a file is not what it claims to be.
MOST_BYTES = 64 << 20
# To wait for the hub's first answer.
HUB_SECONDS = 5
# What the safetensors library itself reads at most.
MOST_HEADER_BYTES = 100_000_000
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4}
BYTES |= {"F16": 2, "BF16": 2, "I16": 2, "U16": 2}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as a header describes it: dtype (``"F8_E4M3"``), shape, its file."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def bytes_each(self) -> int:
        return BYTES.get(self.dtype, 1)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.bytes_each


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before any weight is.

    Attributes:
        name: What the user called it.
        fields: Its config.json, with ModelOpt's quantization_config beside it.
        tensors: Tensor name -> what its header says; None without headers.

    """

    name: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor] | None


def read(model: str) -> Checkpoint:
    """Read a folder, a config.json, or a hub's headers.

    Raises:
        UsageError: It is none of them, cannot be reached, or is damaged.

    """
    path = Path(model)
    if path.is_dir():
        return Checkpoint(model, _config(path / "config.json"), _folder_tensors(path))
    if path.is_file():
        return Checkpoint(model, _config(path), None)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return _from_hub(model)
    raise UsageError(
        f"{model} is no folder, no file and no hub id such as Qwen/Qwen3-30B-A3B-FP8."
    )


def parsed(text: str | bytes, what: str, remedy: str) -> dict[str, Any]:
    """Return a JSON object from text; raise UsageError if that is not what it is."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: {error}. {remedy}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{what} holds no JSON object. {remedy}")
    return fields


def _config(path: Path) -> dict[str, Any]:
    remedy = "Give the config.json of a model, or the folder that holds it."
    fields = parsed(_text(path, remedy), str(path), remedy)
    beside = path.parent / MODELOPT
    if fields.get("quantization_config") is None and beside.is_file():
        again = "Download the checkpoint again."
        fields["quantization_config"] = parsed(_text(beside, again), str(beside), again)
    if not fields.keys() & {"architectures", "model_type"}:
        raise UsageError(f"{path} has neither architectures nor model_type. {remedy}")
    return fields


def _text(path: Path, remedy: str) -> bytes:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path} has over {MOST_BYTES >> 20} MiB. {remedy}")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{error}. {remedy}") from error


def _folder_tensors(folder: Path) -> dict[str, Tensor] | None:
    files = list(_files(folder))
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in header(file).items():
            if name in tensors:
                raise UsageError(
                    f"{name} is in {tensors[name].file} and in {file.name}, and one of "
                    "them is not of this model. Remove it."
                )
            tensors[name] = tensor
    return tensors if files else None


def _files(folder: Path) -> Iterator[Path]:
    """Name the files of weights: of the index if there is one, as vLLM does."""
    again = "Download the checkpoint again."
    if not (folder / INDEX).is_file():
        yield from sorted(folder.glob("*.safetensors"))
        return
    placed = parsed(_text(folder / INDEX, again), str(folder / INDEX), again)
    placed = placed.get("weight_map")
    names = [*placed.values()] if isinstance(placed, dict) else [None]
    are_names = all(isinstance(name, str) for name in names)
    if not are_names or any(Path(name).name != name for name in set(names)):
        raise UsageError(f"{folder / INDEX} has no weight_map of file names. {again}")
    for name in sorted(set(names)):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder / name} is missing, and {INDEX} names it. {again}"
            )
        yield folder / name


def header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, reading nothing but its header.

    Raises:
        UsageError: It is truncated, or its header is not one.

    """
    again = "The file is damaged or still being downloaded: download it again."
    try:
        total = file.stat().st_size
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if total < 8 or size > min(total - 8, MOST_HEADER_BYTES):
                raise UsageError(
                    f"{file} has {total} bytes and a header of {size}. {again}"
                )
            text = opened.read(size)
    except OSError as error:
        raise UsageError(f"{error}. {again}") from error
    entries = parsed(text, f"{file}'s header", again)
    entries.pop("__metadata__", None)
    return {
        name: _tensor(file, name, entry, total - 8 - size)
        for name, entry in entries.items()
    }


def _tensor(file: Path, name: str, entry: Any, data_bytes: int) -> Tensor:
    if isinstance(entry, dict):
        shape, place = entry.get("shape"), entry.get("data_offsets")
        dtype = entry.get("dtype")
        if isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(place):
            tensor = Tensor(dtype, tuple(shape), file.name)
            if _fits(tensor, place, data_bytes):
                return tensor
    shown = json.dumps(entry)
    raise UsageError(
        f"{file}: the header says of {name[:200]} {shown[:200]}, which cannot be, or "
        f"does not fit in {data_bytes} bytes of weights. The file is damaged or still "
        "being downloaded: download it again."
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _fits(tensor: Tensor, place: list[int], data_bytes: int) -> bool:
    if len(place) != 2 or not place[0] <= place[1] <= data_bytes:
        return False
    # Of a dtype that is not known here, the size is not.
    return tensor.dtype not in BYTES or place[1] - place[0] == tensor.bytes


def _from_hub(name: str) -> Checkpoint:
    """Fetch config.json and the headers; weights stay where they are."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UsageError(
            f"{name} is no folder or file here, and to ask the hub for it needs "
            "huggingface_hub: pip install huggingface_hub, or give a config.json."
        ) from error
    try:
        # Which tries once; a download tries again for half a minute.
        address = hub.hf_hub_url(name, "config.json")
        hub.get_hf_file_metadata(address, timeout=HUB_SECONDS)
        path = Path(hub.hf_hub_download(name, "config.json"))
        with suppress(hub.utils.EntryNotFoundError):
            hub.hf_hub_download(name, MODELOPT)
        fields = _config(path)
        found = hub.get_safetensors_metadata(name).files_metadata
    except UsageError:
        raise
    except Exception as error:  # Its own, those of its HTTP library, and the system's.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        reason = reason or type(error).__name__
        raise UsageError(
            f"{name} is no folder or file here, and the hub gave no config.json and "
            f"safetensors headers of it: {reason}. Check name, network and HF_TOKEN, "
            "or download its config.json elsewhere and give that."
        ) from error
    tensors = {
        tensor: _tensor(Path(file), tensor, _entry(info), sys.maxsize)
        for file, metadata in found.items()
        for tensor, info in metadata.tensors.items()
    }
    return Checkpoint(name, fields, tensors)


def _entry(info: Any) -> dict[str, Any]:
    place = list(info.data_offsets)
    return {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": place}
