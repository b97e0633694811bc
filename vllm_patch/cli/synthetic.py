# SPDX-License-Identifier: Apache-2.0
"""Writes a random block-FP8 checkpoint for any architecture Transformers knows.

The weights mean nothing, but a wrong shard or scale shows: neighbouring quant
blocks differ 10x in scale, and every layer's output is as large as its input.
"""

import json
import math
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_patch.cli import UsageError
from vllm_patch.cli.model_config import ModelConfig

# What "10x between neighbours" multiplies the odd squares of a chequerboard by.
SCALE_STEP = 10.0


def write_checkpoint(
    config: ModelConfig, directory: Path, wide: ModelConfig | None = None
) -> None:
    """Write config.json, safetensors and a word-level tokenizer to ``directory``.

    Args:
        config: A block-FP8 config; its ``modules_to_not_convert``, or what its format
            calls that, decides what stays in bfloat16.
        directory: An existing directory.
        wide: The same model with larger MLPs (``ModelConfig.widened``), written in
            its place with zeros in what it adds. It computes the same, and other
            tensor-parallel sizes keep its quant blocks whole.

    Raises:
        UsageError: There is no such model, or no room for it.

    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    wide = wide or config
    shapes, linear = _tensor_shapes(config, directory)
    wide_shapes, _ = _tensor_shapes(wide, directory)
    _check_room(config, wide_shapes, directory)
    written, quantization = config.block_format, config.quantization
    tensors: dict[str, torch.Tensor] = {}
    unquantized = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if (
            len(shape) == 2
            and module in linear
            and not written.leaves(module, quantization)
        ):
            weight, scale = fp8_blocks(_generator(name), shape, config.block)
            wide_shape = wide_shapes[name]
            if shape != wide_shape:
                scale = _widen_scale(name, weight, scale, wide_shape, config.block)
            tensors[name] = _widen(name, weight, wide_shape)
            tensors[f"{module}.{written.scale}"] = written.stored(scale)
        else:
            tensor = _bfloat16(_generator(name), name, shape)
            tensors[name] = _widen(name, tensor, wide_shapes[name])
            unquantized += [module] if module != name else []
    try:
        save_torch_state_dict(tensors, directory, max_shard_size="4GB")
    except SafetensorError as error:
        raise UsageError(
            f"{directory} takes no checkpoint: {error}. Free some space, or set TMPDIR."
        ) from error
    quantization = written.leaving(unquantized, quantization)
    _write_config({**wide.fields, "quantization_config": quantization}, directory)
    write_tokenizer(config.vocab_size, directory)


def _check_room(config: ModelConfig, shapes: dict, directory: Path) -> None:
    """Refuse a checkpoint that memory or disk cannot hold.

    All tensors are in memory at once, in bytes or in bfloat16, and the largest is drawn
    in float32.
    """
    import psutil  # vLLM brings it.

    sizes = [math.prod(shape) for shape in shapes.values()]
    needed = {
        "memory": (sum(sizes) + 8 * max(sizes), psutil.virtual_memory().available),
        "disk": (sum(sizes), shutil.disk_usage(directory).free),
    }
    for what, (least, free) in needed.items():
        if least > free:
            raise UsageError(
                f"{config.path}: a random checkpoint of it takes at least "
                f"{least / 1e9:.1f} GB of {what}, and {free / 1e9:.1f} GB are free; "
                "give --layers 2, or --model with a checkpoint."
            )


def _write_config(fields: dict, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(fields, indent=2))


def _tensor_shapes(
    model: ModelConfig, directory: Path
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return checkpoint tensor names with shapes, and the quantizable modules."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    _write_config(model.fields, directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        config.quantization_config = None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (KeyError, ValueError) as error:
        raise UsageError(f"{model.path}: no model for Transformers: {error}") from error
    # Experts are fused in the model and apart in published checkpoints.
    tensors = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    linear |= {n.removesuffix(".weight") for n in tensors if ".experts." in n}
    return {name: tuple(t.shape) for name, t in tensors.items()}, linear


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _bfloat16(generator: torch.Generator, name: str, shape: tuple[int, ...]):
    if len(shape) == 1 and re.search(r"norm\w*\.weight$", name):
        return torch.ones(shape, dtype=torch.bfloat16)
    std = 1.0 if "embed" in name else 1 / math.sqrt(shape[-1])
    return (torch.randn(shape, generator=generator) * std).bfloat16()


def fp8_blocks(
    generator: torch.Generator, shape: tuple[int, ...], block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an FP8 weight and its block scales, 10x apart between neighbours.

    Args:
        generator: Source of the values.
        shape: ``[out, in]``.
        block: Rows and columns of one quant block.

    Returns:
        float8_e4m3fn ``[out, in]`` and float32 ``[ceil(out / block),
        ceil(in / block)]``.

    """
    rows, columns = (-(-size // block) for size in shape)
    odd = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 1
    step = torch.where(odd, SCALE_STEP, 1.0)
    values = torch.randn(shape, generator=generator).clamp_(-4, 4)
    weight = (values * (448 / 4)).to(torch.float8_e4m3fn)
    # Unit gain: the mean square over both colours of the board is 1 / columns.
    gain = 1 / math.sqrt(shape[1] * (1 + SCALE_STEP**2) / 2)
    scale = step * (gain * 4 / 448)
    return weight, scale.float()


def _widen(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Append zeros up to ``shape``; where gate and up are fused, to each of them."""
    rows = max(tensor.ndim - 2, 0)
    parts = _parts(name)
    shape = [n // parts if dim == rows else n for dim, n in enumerate(shape)]
    return torch.cat([_pad(part, shape) for part in tensor.chunk(parts, rows)], rows)


def _widen_scale(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, ...],
    block: int,
) -> torch.Tensor:
    """Append the scales of added blocks, for each of gate and up.

    They are the smallest of the tensor: vLLM's CPU kernel reads the FP8 code 0 as
    2**-7, which is nothing next to the codes of a block, but much times 1.
    """
    parts = _parts(name)
    if parts > 1 and weight.shape[0] % (parts * block):
        raise UsageError(
            f"{name} has gate and up in one quant block, {weight.shape[0]} / 2 rows "
            "each, and cannot be widened, so stock vLLM is no measure where it is cut; "
            "give --baseline-tp and --control-tp that keep its blocks whole."
        )
    blocks = -(-shape[0] // parts // block), -(-shape[1] // block)
    least = scale.min().item()
    return torch.cat([_pad(part, blocks, least) for part in scale.chunk(parts)])


def _parts(name: str) -> int:
    return 2 if "gate_up_proj" in name else 1


def _pad(tensor: torch.Tensor, shape: Sequence[int], value: float = 0) -> torch.Tensor:
    added = [n - old for n, old in zip(shape, tensor.shape, strict=True)]
    ends = [n for each in reversed(added) for n in (0, each)]
    return torch.nn.functional.pad(tensor, ends, value=value)


def write_tokenizer(vocab_size: int, directory: Path) -> None:
    """Write a tokenizer of words ``t0 t1 ...``, so that ``vllm serve`` starts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", eos_token="t2"
    ).save_pretrained(directory)
