"""Compiles our kernels without a GPU and prints what they take.

    python -m benchmarks.compile_kernels [--arch 89 90 100 120]

Launches them on tensors without memory, and takes down what Triton would compile: the
tiles of the rule and of the tuned files, for a Qwen3-235B rank that starts inside a
quant block, and linear layers of Qwen3-4B and Qwen3-Next at TP 8. Some of the rule's
tiles come with each activation on Hopper, and with the one without up elsewhere; and
down for a rank of as many quant blocks as there may be, all of which it holds. Fails
where a kernel needs more shared memory than a block of the GPU has, or where one that
starts while the kernel before it ends touches what that one may still write.
"""

import argparse
import functools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl

import vllm.triton_utils

# Where it finds no GPU, vLLM puts a stub in the place of Triton.
vllm.triton_utils.tl, vllm.triton_utils.triton = tl, triton

from benchmarks import early_reads  # noqa: E402
from vllm_patch.cli.tune import ahead  # noqa: E402
from vllm_patch.fp8_tp_padding.kernels import (  # noqa: E402
    columns,
    input_quant,
    masked_moe,
    tile_choice,
    tuned_tiles,
)
from vllm_patch.fp8_tp_padding.kernels.fp8_quant import BLOCK  # noqa: E402
from vllm_patch.fp8_tp_padding.kernels.masked_activation import (  # noqa: E402
    Activation,
)
from vllm_patch.fp8_tp_padding.kernels.tiles import Tiles  # noqa: E402
from vllm_patch.fp8_tp_padding.slices.shard import (  # noqa: E402
    BlockShard,
    block_shard,
)
from vllm_patch.fp8_tp_padding.slices.window import Window  # noqa: E402

SHARED_MEMORY = {89: 101376, 90: 232448, 100: 232448, 120: 101376}
EXPERTS, TOP_K, HIDDEN = 128, 8, 4096
SILU = Activation()
# Its columns; and the most that down holds a tile of: 432 columns in four whole blocks.
SHARD, WIDEST = block_shard(1536, BLOCK, 1, 8), block_shard(864, BLOCK, 1, 2)
# One of each branch of the rule, and those for which other activations compile: all
# of them on Hopper, elsewhere the one without up, whose tiles are others.
PAIRS, ACTIVATED = (0.1, 0.2, 0.5, 4, 16, 32, 512), (0.1, 4, 512)
ACTIVATIONS = {
    "DeepSeek-V4": Activation("silu", 10.0),
    "MiniMax-M3": Activation("silu", 7.0, 1.702, 1.0),
    "Step-3.5": Activation("swiglustep", 7.0),
    "Gemma 4": Activation("gelu_tanh"),
    "Nemotron-H": Activation("relu2"),
}


@dataclass(frozen=True)
class Job:
    """One kernel as it is launched on one GPU.

    Attributes:
        arch: Of the GPU.
        what: Name, types, constants and options, as Triton writes them down.

    """

    arch: int
    what: str

    @property
    def name(self) -> list[str]:
        """Module and kernel."""
        return json.loads(self.what)["name"].rsplit(".", 1)

    def run(self) -> "Usage":
        module, name = self.name
        ahead.compile_for(self.arch)
        binary = vars(sys.modules[module])[name].preload(self.what)
        registers, spilled = registers_of(binary)
        depends = json.loads(self.what)["options"]["launch_pdl"]
        waiting = early_reads.problem(name, binary.asm["ttgir"], depends)
        return Usage(registers, spilled, binary.metadata.shared, waiting)


@dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread.
        shared: Bytes of shared memory of a program.
        waiting: What is wrong with how it waits for the kernel before it.

    """

    registers: int
    spilled: int
    shared: int
    waiting: str | None

    def problem(self, arch: int) -> str | None:
        if self.shared > SHARED_MEMORY[arch]:
            return "TOO LARGE"
        return self.waiting


def registers_of(binary) -> tuple[int, int]:
    """Return registers of a thread and bytes that spill to its stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout).groups()
    return int(registers), int(stack)


def launched(arch: int, call: Callable[[], None]) -> list[Job]:
    """Return what ``call`` launches; nothing is compiled or run."""
    ahead.compile_for(arch)
    return [Job(arch, what) for what in ahead.launched(call)]


def launch_experts(
    tiles: Tiles,
    tokens: int,
    activation: Activation = SILU,
    shard: BlockShard = SHARD,
) -> None:
    sizes = tokens, TOP_K, HIDDEN, EXPERTS, shard, torch.bfloat16
    problem = masked_moe.Problem(*sizes, activation=activation)
    for kernel in ahead.kernels(problem, tiles):
        kernel()


def launch_linear_layers(arch: int) -> None:
    """Pad down, and take the columns of a wide and a narrow gate_up."""
    depends = {"launches_dependently": lambda: arch >= 90}
    columns_on_gpu = mock.patch.multiple(columns, **depends, _launches=lambda: True)
    with columns_on_gpu, mock.patch.multiple(input_quant, **depends):
        for total in 9728, 512:
            window = Window.of_elements(block_shard(total, BLOCK, 1, 8), total)
            x = torch.empty(4096, 2 * window.span, dtype=torch.bfloat16, device="meta")
            columns.RealColumns([window, window])(x)
        x, scales = x.narrow(-1, 0, window.size), {"column_major": True}
        scales.update(row_multiple=4, use_ue8m0=True)
        input_quant._padded_quant(x, window.lead, window.span, BLOCK, **scales)


def rules_paths(arch: int, shard: BlockShard) -> dict[Tiles, tuple[int, str]]:
    """Return tokens and origin of each different path of the rule on this GPU."""
    found: dict[Tiles, tuple[int, str]] = {}
    for pairs in PAIRS:
        tokens = max(1, int(pairs * EXPERTS / TOP_K))
        tiles = tile_choice.rule(tokens * TOP_K, EXPERTS, shard, hopper=arch == 90)
        found.setdefault(tiles, (tokens, f"rule, {pairs} pairs"))
    return found


def paths(arch: int) -> dict[Tiles, tuple[int, str]]:
    """Return tokens and origin of each different path of this GPU."""
    found = rules_paths(arch, SHARD)
    for path in sorted(tuned_tiles.CONFIGS.glob("*H200*")) if arch == 90 else []:
        name = path.name.partition(",dev")[0]
        for tokens, tiles in tuned_tiles.read_config(path).items():
            found.setdefault(tiles, (tokens, f"{name}, {tokens} tok."))
    return found


def jobs(arch: int) -> dict[Job, str]:
    """Return the different kernels of a GPU, and where each comes from."""
    found: dict[Job, str] = {}
    activated = {f"rule, {pairs} pairs" for pairs in ACTIVATED}
    for tiles, (tokens, origin) in paths(arch).items():
        call = functools.partial(launch_experts, tiles, tokens)
        for job in launched(arch, call):
            found.setdefault(job, origin)
        for model, activation in ACTIVATIONS.items() if origin in activated else ():
            if activation.shards == 2 and arch != 90:
                continue
            call = functools.partial(launch_experts, tiles, tokens, activation)
            for job in launched(arch, call):
                found.setdefault(job, f"{origin}, {model}")
    for tiles, (tokens, origin) in rules_paths(arch, WIDEST).items():
        call = functools.partial(launch_experts, tiles, tokens, shard=WIDEST)
        for job in launched(arch, call):
            if job.name[1].startswith("down"):
                found.setdefault(job, f"{origin}, four blocks")
    for job in launched(arch, functools.partial(launch_linear_layers, arch)):
        found[job] = "linear layers"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(SHARED_MEMORY), metavar="SM"
    )
    found = {
        job: at for arch in parser.parse_args().arch for job, at in jobs(arch).items()
    }
    problems = 0
    print(f"{'GPU':7}{'kernel':21}{'registers':>10}{'spilled':>9}{'shared':>9}  tiles")
    with multiprocessing.get_context("fork").Pool() as pool:
        for job, used in zip(found, pool.imap(Job.run, found), strict=True):
            problem = used.problem(job.arch)
            problems += problem is not None
            print(
                f"sm_{job.arch:<4}{job.name[1]:21}{used.registers:10}"
                f"{used.spilled:9}{used.shared:9}  {found[job]}"
                f"{f'  {problem}' if problem else ''}",
                flush=True,
            )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
