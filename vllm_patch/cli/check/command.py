# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vllm-patch check``."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vllm_patch import plugin, releases
from vllm_patch.cli import UsageError, environment
from vllm_patch.cli.check import checkpoint, derived, layers, plot, quantization, report
from vllm_patch.cli.check.checkpoint import Checkpoint
from vllm_patch.cli.check.layers import Layers
from vllm_patch.cli.check.quantization import Quantization
from vllm_patch.cli.check.stock import (
    AUTO,
    BACKENDS,
    CPU,
    FORMATS,
    PLATFORMS,
    Setting,
)
from vllm_patch.cli.check.verdict import AS_IT_IS, CANNOT_RUN, Verdict, chosen
from vllm_patch.wrappers import MODES, VARIABLE

MOST_TP, ALL = 1024, range(1, 65)
DESCRIPTION = """\
Say what tensor parallelism does to a block-FP8 model, before it is loaded: which
layers are cut inside a quant block, what stock vLLM does with each, and what this
package does. Reads config.json and the headers of safetensors; needs neither vLLM
nor torch. Exit code: 0 runs in vLLM as it is, 1 needs this package, 2 cannot run,
cannot be told, or wrong usage; of several sizes, the largest, and with --all
that of the size to choose."""
EXAMPLES = """\
  vllm-patch check Qwen/Qwen3-235B-A22B-FP8 -tp 8
  vllm-patch check /models/Qwen3-30B-A3B-FP8 --all
  vllm-patch check config.json -tp 4 -tp 8 --vllm-version 0.28.0 --json
  vllm-patch check config.json -tp 8 --plot cut.svg"""


# As vLLM spells it, too.
TP = "--tp", "-tp", "--tensor-parallel-size"


def parser_of(
    commands: argparse._SubParsersAction,
    name: str,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Return the parser of a command about a model."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint's folder, a config.json, or a hub id; weights are not read",
    )
    return parser


def add_parser(commands: argparse._SubParsersAction) -> None:
    summary = "tell what a TP size does to a model, before it is loaded"
    parser = parser_of(commands, "check", summary, DESCRIPTION, EXAMPLES)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        *TP,
        type=int,
        action="append",
        metavar="N",
        help="tensor-parallel size; may be given again",
    )
    asked.add_argument(
        "--all", action="store_true", help="a table of the sizes up to 64"
    )
    parser.add_argument(
        "--vllm-version",
        choices=releases.SUPPORTED,
        metavar="RELEASE",
        help="default: the installed one, else the newest that is supported",
    )
    parser.add_argument(
        "--platform", choices=PLATFORMS, default=PLATFORMS[0], help="default: hopper"
    )
    parser.add_argument(
        "--moe-backend", choices=BACKENDS, default=BACKENDS[0], help="as for vllm serve"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON; python -m pydoc vllm_patch.cli.check.report documents it",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw how ranks cut the blocks of one layer: .svg, or .png with cairosvg",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report that ``args`` asks for; return the exit code.

    Raises:
        UsageError: The model cannot be read, or nothing of it is in FP8 blocks that
            could be cut.

    """
    if args.platform == CPU and args.moe_backend != AUTO:
        raise UsageError(
            f"--moe-backend {args.moe_backend} has kernels for GPUs only. Give "
            f"{AUTO} on {CPU}."
        )
    asked = args.tp or ALL
    for tp in asked:
        check_size("--tp", tp)
    if (mode := environment.mode()) not in MODES:
        raise UsageError(
            f"{VARIABLE}={mode}: with this, vLLM stops at its start. Unset it, or give "
            f"one of {', '.join(MODES)}."
        )
    found = checkpoint.read(args.model)
    how = quantization.read(found.fields, found.name)
    text = _text(found)
    if not _has_blocks(how):
        code = _say_not_in_blocks(found, how, text, args.tp or (), args.json)
        if args.plot:
            _draw([], args.plot)
        return code
    # A release that is named is one as published.
    is_built_in = not args.vllm_version and plugin.built_in() is not None
    release = args.vllm_version or _installed()
    setting = Setting(
        *(release, asked[0], args.platform, args.moe_backend, how.format, how.block),
        is_built_in=is_built_in,
    )
    model, source = _layers(found, how, text)
    verdicts = [Verdict(model, text, replace(setting, tp=tp)) for tp in asked]
    left_out = []
    if args.all:
        left_out = [verdict for verdict in verdicts if verdict.undivided]
        verdicts = [verdict for verdict in verdicts if not verdict.undivided]
    code = max(verdict.code for verdict in verdicts)
    if args.all:
        best = chosen(verdicts)
        code = best.code if best else CANNOT_RUN
    if args.json:
        said = report.as_json(found.name, source, how, verdicts, code, left_out)
        print(json.dumps(said, indent=2))
    elif args.all:
        print(report.table(found.name, source, how, verdicts, left_out))
    else:
        print(report.text(found.name, source, how, verdicts))
    if args.plot:
        _draw(verdicts, args.plot)
    return code


def _draw(verdicts: list[Verdict], file: Path) -> None:
    if drawn := plot.write(verdicts, file):
        said = f"how TP {drawn.setting.tp} cuts {drawn.layer.name}"
    else:
        said = "not written: ranks cut no layer that this package takes"
    print(f"{file}: {said}", file=sys.stderr)


def verdict(found: Checkpoint, tp: int) -> Verdict:
    """Return what becomes of a model at one size in the installed vLLM, on a GPU.

    Raises:
        UsageError: It makes no sense, or is not in FP8 blocks that could be cut.

    """
    check_size("--tp", tp)
    how = quantization.read(found.fields, found.name)
    if not _has_blocks(how):
        raise UsageError(
            f"{found.name}: {how.format} has no FP8 blocks that could be cut."
        )
    text = _text(found)
    model, _ = _layers(found, how, text)
    setting = Setting(_installed(), tp, PLATFORMS[0], AUTO, how.format, how.block)
    return Verdict(model, text, setting)


def check_size(option: str, tp: int) -> None:
    if not 0 < tp <= MOST_TP:
        raise UsageError(f"{option} {tp}: give a number from 1 to {MOST_TP}.")


def _has_blocks(how: Quantization) -> bool:
    return how.block is not None and how.format in FORMATS


def _say_not_in_blocks(
    found: Checkpoint,
    how: Quantization,
    text: dict,
    asked: Sequence[int],
    as_json: bool,
) -> int:
    is_judged = how.format in (quantization.UNQUANTIZED, "fp8")
    if is_judged and found.tensors is not None:
        _check_that_none_is(found, how, text)
    said = (
        f"{how.format}: no weights in FP8 blocks that this package knows, so it "
        "changes nothing. MXFP8, NVFP4, INT4, scales per tensor or per channel, and 16 "
        "bits are stock vLLM's"
    )
    said += "." if is_judged else ", and not judged here."
    refused = [(tp, _undivided(text, how, tp)) for tp in asked]
    said += "".join(f" TP {tp} cannot run: {why}" for tp, why in refused if why)
    is_fine = is_judged and not any(why for _, why in refused)
    code = AS_IT_IS if is_fine else CANNOT_RUN
    if as_json:
        print(json.dumps(report.without_blocks(found.name, how, code, said), indent=2))
    else:
        print(f"{found.name}: {said}")
    return code


def _check_that_none_is(found: Checkpoint, how: Quantization, text: dict) -> None:
    """Raise UsageError if a tensor is in FP8 in a way that the config does not say."""
    if how.format != quantization.UNQUANTIZED:
        layers.layers(found.tensors, how, text)
        return
    for name, tensor in found.tensors.items():
        if tensor.dtype == "F8_E4M3":
            raise UsageError(
                f"{found.name}: not known: {name} in {tensor.file} is FP8, and "
                "config.json has no quantization_config. Take it from the published "
                "one, or download hf_quant_config.json."
            )


def _undivided(text: dict, how: Quantization, tp: int) -> str | None:
    """Return why vLLM shares a model without FP8 blocks among no ``tp`` ranks."""
    # None of this depends on release, platform or backend.
    blocks = Quantization(how.format, (1, 1))
    setting = Setting(
        *(releases.SUPPORTED[-1], tp, PLATFORMS[0], BACKENDS[0], "fp8", blocks.block)
    )
    model = Layers()
    # Its sizes are those of layers in blocks, where they are known.
    with suppress(UsageError):
        model = layers.layers(derived.tensors(text, blocks).tensors, blocks, text)
    return Verdict(model, text, setting).undivided


def _layers(found: Checkpoint, how: Quantization, text: dict) -> tuple[Layers, str]:
    """Return the model's layers and where they are from."""
    if found.tensors is not None:
        model = layers.layers(found.tensors, how, text)
        if not model.found and not model.unknown:
            raise UsageError(
                f"{found.name}: config.json says {how.format} in FP8 blocks, and no "
                "tensor of its files is. Compare both with the published ones."
            )
        return model, "headers"
    implied = derived.tensors(text, how)
    model = layers.layers(implied.tensors, how, text)
    model.unknown.update(implied.unknown)
    model.other_bytes = 0  # Embeddings and norms are not derived.
    model.notes.append(
        "derived from config.json alone: the checkpoint's folder or hub id would tell"
    )
    return model, "config"


def _text(found: Checkpoint) -> dict:
    """Return the language model's fields, which multimodal models nest."""
    text = found.fields.get("text_config") or found.fields
    if not isinstance(text, dict):
        raise UsageError(f"{found.name}: text_config in config.json is no object.")
    # Whose code builds its layers may be said of the whole only.
    kind = found.fields.get("model_type")
    return {**text, "model_type": kind} if kind in layers.PAD_THEMSELVES else text


def _installed() -> str:
    """Return the installed release, or the newest supported one without any."""
    version = releases.installed() or releases.SUPPORTED[-1]
    if releases.is_supported(version):
        return version.partition("+")[0]
    raise UsageError(
        f"vLLM {version} is installed, of which check knows nothing. Give "
        f"--vllm-version: {', '.join(releases.SUPPORTED)}."
    )
