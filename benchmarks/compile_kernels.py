"""Compiles our kernels without a GPU and prints what they take.

    python -m benchmarks.compile_kernels [--arch 89 90 100 120]

Takes the tiles of the rule and of the tuned files, for a Qwen3-235B rank that starts
inside a quant block, and gate_up of Qwen3-4B at TP 8. Fails where a kernel needs more
shared memory than a block of the GPU has, or where one that starts while the kernel
before it ends touches memory before it waits for that one.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vllm.triton_utils

# Where it finds no GPU, vLLM puts a stub in the place of Triton.
vllm.triton_utils.tl, vllm.triton_utils.triton = tl, triton

from vllm_patch.fp8_tp_padding import (  # noqa: E402
    columns,
    input_quant,
    masked_kernels,
    masked_linear,
    tiles,
)

SHARED_MEMORY = {89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Instructions that touch memory of other kernels.
MEMORY = re.compile(r"\b(?:ld|st|atom|red)\.[\w.]*global|\bcp\.async|\bcp\.red")
POINTERS = {
    "x_ptr": "*bf16",
    "x_codes_ptr": "*fp8e4nv",
    "x_scale_ptr": "*fp32",
    "w_ptr": "*fp8e4nv",
    "w_scale_ptr": "*fp32",
    "h_ptr": "*bf16",
    "h_scale_ptr": "*fp32",
    "y_ptr": "*bf16",
    "out_ptr": "*bf16",
    "topk_ids_ptr": "*i32",
    "topk_weights_ptr": "*fp32",
    "counts_ptr": "*i32",
    "sorted_pairs_ptr": "*i32",
    "block_experts_ptr": "*i32",
    "num_blocks_ptr": "*i32",
    "codes_ptr": "*fp8e4nv",
    "scales_ptr": "*fp32",
}
# Of the numbers, those that are multiples of 16; the rest is any.
MULTIPLES = ("x_stride", "x_token_stride", "w_row_stride", "span", "size")
CONSTANTS = {
    "K": 4096,
    "SIZE": 192,
    "LEAD": 64,
    "NUM_BLOCKS": 2,
    "TOP_K": 8,
    "ROWS": 16,
    "GROUPS": 8,
    "NUM_IDS": 128,
    "BINS": 128,
    "CHUNK": 4096,
    "CHUNKS": 8,
    "MUL_WEIGHT": True,
    "HAS_EXPERT_MAP": False,
    "expert_map_ptr": None,
}
LINEAR_CONSTANTS = {
    "K": 2560,
    "STARTS": (0, 1216),
    "SHIFTS": (64, 128),
    "SIZE": 2560,
    "TOTAL": 2432,
    "HAS_BIAS": False,
    "bias_ptr": None,
    "GROUP": 128,
    "BLOCK": 128,
    "USE_UE8M0": True,
    # What is 1 is a constant to Triton.
    "x_column_stride": 1,
    "w_column_stride": 1,
    "w_scale_column_stride": 1,
    "x_scale_token_stride": 1,
    "scales_token_stride": 1,
}


def kernels(chosen: tiles.Tiles) -> Iterator[tuple[str, int, dict]]:
    """Yield name, warps and constants of each kernel of a path."""
    path = {
        "SORTED": chosen.sort,
        "BLOCK_M": chosen.block_m,
        "USE_PDL": chosen.pdl,
        "QUANTIZE": chosen.quantize_in_gate_up,
        "QUANTIZED": chosen.quantize_in_gate_up,
        "SPLITS": chosen.down_splits,
        "UNROLL": chosen.gate_up.unroll,
    }
    last = "down_kernel" if chosen.sort else "down_and_sum_kernel"
    for name, tile in (("gate_up_kernel", chosen.gate_up), (last, chosen.down)):
        options = tile.launch_options
        yield name, options.pop("num_warps"), {**path, **options}
    names = ["prepare_kernel", "sort_kernel", "sum_kernel"]
    for name in names if chosen.sort else names[:1]:
        yield name, 4, {**path, "BLOCK_N": 1024}


def linear_kernels(arch: int) -> Iterator[tuple[str, int, dict]]:
    """Yield name, warps and constants of the kernels of linear layers."""
    sizes = {"TOKENS": input_quant.TOKENS_PER_PROGRAM, "USE_PDL": arch >= 90}
    yield "_padded_quant_kernel", 4, sizes
    for columns_each in (128, columns.MAX_COLUMNS_PER_PROGRAM):
        sizes = {
            "TOKENS": columns.TOKENS_PER_PROGRAM,
            "COLUMNS": columns_each,
            "USE_PDL": arch >= 90,
        }
        yield "_copy_kernel", 4, sizes
    if arch == 90:
        sizes = {
            "TOKENS": masked_linear.MAX_TOKENS,
            "COLUMNS": masked_linear.COLUMNS_PER_PROGRAM,
            "NUM_STAGES": masked_linear.NUM_STAGES,
            "UNROLL": masked_linear.UNROLL,
            "USE_PDL": True,
        }
        yield "_masked_linear_kernel", masked_linear.NUM_WARPS, sizes


def kernel_of(name: str):
    modules = masked_kernels, columns, input_quant, masked_linear
    return next(vars(module)[name] for module in modules if name in vars(module))


@dataclass(frozen=True)
class Job:
    """One kernel for one GPU; ``values`` are the constants that it takes."""

    arch: int
    name: str
    num_warps: int
    values: tuple[tuple[str, object], ...]

    def compile(self):
        kernel = kernel_of(self.name)
        constants = dict(self.values)
        pointers = dict(POINTERS)
        if constants.get("QUANTIZE") or constants.get("QUANTIZED"):
            pointers["h_ptr"] = "*fp8e4nv"
        signature, values, attributes = {}, {}, {}
        for index, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
                values[(index,)] = constants[argument]
            else:
                signature[argument] = pointers.get(argument, "i32")
                if argument in pointers or argument in MULTIPLES:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, values, attributes)
        target = GPUTarget("cuda", self.arch, 32)
        options = {"num_warps": self.num_warps}
        return triton.compile(source, target=target, options=options)

    def run(self) -> "Usage":
        binary = self.compile()
        registers, spilled = registers_of(binary)
        depends = dict(self.values).get("USE_PDL", False)
        waits = waits_first(binary.asm["ptx"]) == depends
        return Usage(registers, spilled, binary.metadata.shared, waits)


@dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread.
        shared: Bytes of shared memory of a program.
        waits: Whether it waits for the kernel before it just where it has to.

    """

    registers: int
    spilled: int
    shared: int
    waits: bool

    def problem(self, arch: int) -> str | None:
        if self.shared > SHARED_MEMORY[arch]:
            return "TOO LARGE"
        return None if self.waits else "DOES NOT WAIT, OR WAITS FOR NOTHING"


def waits_first(ptx: str) -> bool:
    """Whether memory is touched only after waiting for the kernel before."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return bool(wait) and not MEMORY.search(before)


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


def paths(arch: int) -> dict[tiles.Tiles, str]:
    """Return where each different path of this GPU comes from."""
    found: dict[tiles.Tiles, str] = {}
    for pairs in (0.1, 0.5, 4, 16, 256):
        found.setdefault(tiles.rule(pairs, hopper=arch == 90), f"rule, {pairs} pairs")
    for path in sorted(tiles.CONFIGS.glob("*H200*")) if arch == 90 else []:
        for tokens, chosen in tiles.read_config(path).items():
            found.setdefault(chosen, f"{path.name.partition(',dev')[0]}, {tokens} tok.")
    return found


def jobs(arch: int) -> dict[Job, str]:
    """Return the different kernels of a GPU's paths, and where each comes from."""
    found: dict[Job, str] = {}
    for chosen, origin in paths(arch).items():
        for name, num_warps, constants in kernels(chosen):
            job = job_of(arch, name, num_warps, {**CONSTANTS, **constants})
            found.setdefault(job, origin)
    for name, num_warps, constants in linear_kernels(arch):
        job = job_of(arch, name, num_warps, {**LINEAR_CONSTANTS, **constants})
        found[job] = "linear layers"
    return found


def job_of(arch: int, name: str, num_warps: int, constants: dict) -> Job:
    taken = kernel_of(name).arg_names
    values = tuple((a, constants[a]) for a in taken if a in constants)
    return Job(arch, name, num_warps, values)


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
                f"sm_{job.arch:<4}{job.name:21}{used.registers:10}{used.spilled:9}"
                f"{used.shared:9}  {found[job]}{f'  {problem}' if problem else ''}",
                flush=True,
            )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
