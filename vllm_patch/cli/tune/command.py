# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vllm-patch tune``."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_patch.cli import UsageError, environment, remove, signals_held
from vllm_patch.cli.check import command as check
from vllm_patch.cli.tune.cases import Case, cases

if TYPE_CHECKING:
    import torch

    from vllm_patch.cli.tune.ahead import Compilers
    from vllm_patch.cli.tune.candidates import Gpu
    from vllm_patch.cli.tune.search import Option

TOKENS = 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384
MOST_TOKENS = 65536
LEAST_CAPABILITY = 89
DESCRIPTION = """\
Find the fastest tiles of the masked kernels for a model on this GPU, which has to be
idle, and write them where vLLM looks for tuned files. Takes half a minute to two of
one GPU, whatever the TP size. What is not faster by more than the noise, or computes
anything else, is not taken. Exit code: 0, or 2 if nothing can be tuned."""
EXAMPLES = """\
  vllm-patch tune Qwen/Qwen3-235B-A22B-FP8 --tp 8 --output tuned
  vllm-patch tune config.json --tp 8 --tokens 1 64 4096 --output tuned"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    summary = "find the fastest tiles for a model on this GPU, once"
    parser = check.parser_of(commands, "tune", summary, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        *check.TP,
        type=int,
        required=True,
        metavar="N",
        help="tensor-parallel size",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tune these numbers of tokens only. Default: {TOKENS[0]} to {TOKENS[-1]}",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for the files. Default: what {environment.TUNED_FOLDER} says",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune the experts of ``args.model``; return 0.

    Raises:
        UsageError: Nothing of it can be tuned, here, or written there.

    """
    tokens = args.tokens or TOKENS
    for number in tokens:
        if not 0 < number <= MOST_TOKENS:
            raise UsageError(
                f"--tokens {number}: give numbers from 1 to {MOST_TOKENS}."
            )
    told = os.environ.get(environment.TUNED_FOLDER)
    if not (args.output or told):
        raise UsageError(
            "there is no folder for the result. Give --output DIR, or set "
            f"{environment.TUNED_FOLDER}, where vLLM then finds it."
        )
    folder = args.output or Path(told)
    written = tune(cases(args.model, args.tp), tokens, folder)
    if written and not (told and folder.resolve() == Path(told).resolve()):
        print(
            "To use it, start vLLM with this, on each node, where the file has to be:\n"
            f"  export {environment.TUNED_FOLDER}={folder.resolve()}"
        )
    return 0


def tune(found: Sequence[Case], tokens: Sequence[int], folder: Path) -> list[Path]:
    """Tune experts, print what it gains, and return the files that were written.

    Args:
        found: Experts.
        tokens: Numbers of tokens that are tuned; of others in ``TOKENS``, files hold
            what calls take as it is.
        folder: Where files are written; those that are there are what calls take.

    Raises:
        UsageError: There is no GPU for it, or nothing can be written there.

    """
    arch = _arch()
    _prepare(folder)
    os.environ[environment.TUNED_FOLDER] = str(folder)
    from vllm_patch.cli.tune.ahead import Compilers
    from vllm_patch.fp8_tp_padding.kernels.tuned_tiles import config_name

    files = []
    with Compilers(arch) as compilers:
        device, gpu = _device()
        for case in found:
            print(f"{case}\n", flush=True)
            started = time.monotonic()
            chosen = _tuned(case, tokens, device, gpu, compilers)
            print(_table({n: chosen[n] for n in sorted({*tokens})}), "\n", sep="")
            seconds = time.monotonic() - started
            file = folder / config_name(case.experts, case.shard.size)
            if any(option.is_gain for option in chosen.values()):
                _write(file, _text(chosen))
                files.append(file)
                print(f"{seconds:.0f} s. Wrote {file}", flush=True)
            else:
                print(f"{seconds:.0f} s. Nothing is faster: no file.", flush=True)
    return files


def _prepare(folder: Path) -> None:
    """Make a folder, if need be, in which a file can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{error}. Give a folder that can be written.") from error


def _arch() -> int:
    """Return the GPU's compute capability, such as 90, without a CUDA context."""
    try:
        import torch

        from vllm.platforms import current_platform
    except ImportError as error:
        raise UsageError(
            f"tune runs vLLM's kernels, and vLLM cannot be imported: {error}. Install "
            "it, on the machine with the GPU."
        ) from error
    if not current_platform.is_cuda() or not torch.cuda.is_available():
        raise UsageError(
            "tune times kernels on a CUDA GPU, and vLLM and torch "
            f"{torch.__version__} see none. Run it on the kind of machine that serves "
            "the model, with vLLM's build for CUDA; look at nvidia-smi and at "
            "CUDA_VISIBLE_DEVICES."
        )
    arch = current_platform.get_device_capability().to_int()
    if arch < LEAST_CAPABILITY:
        raise UsageError(
            f"{current_platform.get_device_name()} has compute capability "
            f"{arch / 10}, and FP8 needs {LEAST_CAPABILITY / 10}: vLLM takes kernels "
            "without tiles of ours there."
        )
    return arch


def _device() -> "tuple[torch.device, Gpu]":
    """Return the GPU, and what is known of it."""
    import torch

    from vllm.platforms import current_platform
    from vllm_patch.cli.tune.candidates import Gpu
    from vllm_patch.fp8_tp_padding.kernels.dependent_launch import launches_dependently

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    return device, Gpu(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        launches_dependently(),
        current_platform.is_device_capability(90),
    )


def _tuned(
    case: Case,
    tokens: Sequence[int],
    device: "torch.device",
    gpu: "Gpu",
    compilers: "Compilers",
) -> "dict[int, Option]":
    from triton.errors import TritonError

    from vllm_patch.cli.tune import search
    from vllm_patch.cli.tune.experts import Layer
    from vllm_patch.fp8_tp_padding.kernels.tuned_tiles import tuned_tiles

    kept = {*TOKENS, *tuned_tiles(case.experts, case.shard.size)}
    try:
        return search.tune(Layer(case, device, gpu), {*tokens}, kept, compilers)
    except TritonError as error:
        raise UsageError(
            f"{case}: the tiles that are in use now do not run on this GPU: {error}. "
            "If they are of a tuned file, which is logged, delete it."
        ) from error


def _table(chosen: "dict[int, Option]") -> str:
    lines = [f"{'tokens':>6} {'before':>10} {'after':>10} {'gain':>7}  pairs"]
    for tokens, option in chosen.items():
        said, gain = "kept", "-"
        if option.after != option.before:
            block_m = option.tiles.block_m
            said = f"blocks of {block_m}" if block_m else "each alone"
            said += ", warps specialize" if option.tiles.specialized else ""
            gain = f"{option.before / option.after:.2f}x"
        times = f"{option.before:7.1f} us {option.after:7.1f} us"
        lines.append(f"{tokens:6} {times} {gain:>7}  {said}")
    return "\n".join(lines)


def _text(chosen: "dict[int, Option]") -> str:
    """Return a file's content: a line for each number of tokens."""
    import triton

    lines = [f'"triton_version": {json.dumps(triton.__version__)}']
    lines += [f'"{n}": {json.dumps(asdict(o.tiles))}' for n, o in chosen.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


@signals_held()
def _write(file: Path, text: str) -> None:
    """Write all of a file or nothing; an earlier one is there until then."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        os.replace(beside, file)
    except BaseException:
        remove([beside], set())
        raise
