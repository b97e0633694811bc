"""Breaks the package in one place at a time, and says which gates notice.

``python -m tests.mutants NAME=COMMAND...`` copies the repository, applies one mutation
after the other there, runs each command, which has to fail, and prints its last line,
to see that it fails for the mutation. The commands see the copy as their working
directory; all must pass without a mutation.

    python -m tests.mutants \\
        tests='python -m pytest -qx tests/fp8_tp_padding' \\
        parity='python -m vllm_patch parity --config ... --tp 8'
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parent.parent
PACKAGE = "vllm_patch/fp8_tp_padding"
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")


class Mutant(NamedTuple):
    """One mistake: ``old``, which ``file`` has once, becomes ``new``."""

    what: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "experts: a column too few in gate and up",
        "kernels/masked_kernels.py",
        "real_row = (row >= 0) & (row < SIZE)",
        "real_row = (row >= 0) & (row < SIZE - 1)",
    ),
    Mutant(
        "experts: a tile takes the next block's scale",
        "kernels/masked_kernels.py",
        "group = tile * BLOCK_N // BLOCK",
        "group = (tile * BLOCK_N + 64) // BLOCK % NUM_BLOCKS",
    ),
    Mutant(
        "experts: gate and up take the first token's scales",
        "kernels/masked_kernels.py",
        "x_scale_ptr + token * K_BLOCKS",
        "x_scale_ptr + token * 0",
    ),
    Mutant(
        "experts: down takes the first block's scale for all",
        "kernels/masked_kernels.py",
        "tl.load(w_scale_ptr + block)",
        "tl.load(w_scale_ptr + block * 0)",
    ),
    Mutant(
        "experts: down's half block starts 64 columns early",
        "kernels/masked_kernels.py",
        "(first + HALF - LEAD)",
        "(first - LEAD)",
    ),
    Mutant(
        "experts: up takes the gate's scale",
        "kernels/masked_kernels.py",
        "gate_scale_ptr + NUM_BLOCKS * K_BLOCKS",
        "gate_scale_ptr",
    ),
    Mutant(
        "experts: two rows of the output are swapped",
        "kernels/masked_kernels.py",
        "K + row, total",
        "K + (row ^ 1), total",
    ),
    Mutant(
        "experts: two rows of a tile are swapped",
        "kernels/masked_kernels.py",
        "y_ptrs + row[None, :], y",
        "y_ptrs + (row ^ 1)[None, :], y",
    ),
    Mutant(
        "experts: gate's and up's rows come from one further on",
        "kernels/masked_kernels.py",
        "K) + row[:, None] * K",
        "K) + (row[:, None] + 1) * K",
    ),
    Mutant(
        "experts: one slot of a token is left out",
        "kernels/masked_kernels.py",
        "_per_pair(slot == one, SWAP)",
        "_per_pair((slot == one) & (slot > 0), SWAP)",
    ),
    Mutant(
        "experts: padded tokens of a sorted block are summed",
        "kernels/masked_kernels.py",
        "token = (pair // TOP_K)",
        "token = ((pair + 1) // TOP_K)",
    ),
    Mutant(
        "experts: gate's scale has the bits of a bfloat16",
        "kernels/masked_kernels.py",
        "tl.load(gate_scale_ptr + block)",
        "tl.load(gate_scale_ptr + block).to(tl.bfloat16).to(tl.float32)",
    ),
    Mutant(
        "experts: up is clamped on one side",
        "kernels/masked_activation.py",
        "            up = tl.clamp(up, -LIMIT, LIMIT)\n        if",
        "            up = tl.minimum(up, LIMIT)\n        if",
    ),
    Mutant(
        "experts: what has no gate is read as if it had one",
        "kernels/masked_kernels.py",
        "expert * (SHARDS * SIZE * K)",
        "expert * (2 * SIZE * K)",
    ),
    Mutant(
        "experts: of what is split along K, SiLU is computed",
        "kernels/masked_kernels.py",
        "h = activated(gate, up, ACTIVATION, LIMIT, ALPHA, BETA).to(dtype)",
        'h = activated(gate, up, "silu", None, 1.0, 0.0).to(dtype)',
    ),
    Mutant(
        "experts: a part of what is split along K is left out",
        "kernels/masked_kernels.py",
        "for split in tl.static_range(SPLITS):",
        "for split in tl.static_range(SPLITS - 1):",
    ),
    Mutant(
        "experts: sorting counts on from the call before",
        "kernels/pair_kernels.py",
        "tl.store(placed_ptr + bins, tl.zeros([BINS], tl.int32))",
        "tl.store(placed_ptr + bins, tl.zeros([BINS], tl.int32) + 1)",
    ),
    Mutant(
        "experts: pairs beyond a block are those of it again",
        "kernels/pair_kernels.py",
        "- 1 - (pid_m - first) * BLOCK_M",
        "- 1",
    ),
    Mutant(
        "experts: of found pairs, neighbours are swapped",
        "kernels/pair_kernels.py",
        "tl.where(chosen, pair[:, None], num_pairs)",
        "tl.where(chosen, pair[:, None] ^ 1, num_pairs)",
    ),
    Mutant(
        "experts: down's first columns are of no activations",
        "kernels/masked_kernels.py",
        "if USE_PDL and start == 0:",
        "if USE_PDL and start == BLOCK_N:",
    ),
    Mutant(
        "experts: what has nothing to do does not wait",
        "kernels/masked_kernels.py",
        "what follows could overtake gate and up.\n        wait_for_previous(USE_PDL)",
        "what follows could overtake gate and up.",
    ),
    Mutant(
        "experts: a token's first slot is of no activations",
        "kernels/masked_kernels.py",
        "if USE_PDL and one == 0:",
        "if USE_PDL and one == 1:",
    ),
    Mutant(
        "launches: another tensor's address",
        "kernels/launches.py",
        "values[parameter] = addresses[tensor]",
        "values[parameter] = addresses[tensor - 1]",
    ),
    Mutant(
        "launches: addresses that no binary is for",
        "kernels/launches.py",
        "if _are_aligned(addresses) else None",
        "if addresses else None",
    ),
    Mutant(
        "experts: down sums in bfloat16",
        "kernels/masked_kernels.py",
        "out += part * tl.load(w_scale_ptr + block)",
        "out += (part * tl.load(w_scale_ptr + block)).to(tl.bfloat16).to(tl.float32)",
    ),
    Mutant(
        "choice: blocks of any size are taken",
        "kernels/masked_experts.py",
        "shard.num_blocks) != BLOCK",
        "shard.num_blocks) < 1",
    ),
    Mutant(
        "choice: what vLLM says of its Triton experts is left out",
        "kernels/masked_experts.py",
        "        if supported:\n",
        "        if True:\n",
    ),
    Mutant(
        "linear: a column too few is quantized",
        "kernels/input_quant.py",
        "(column < lead + size)",
        "(column < lead + size - 1)",
    ),
    Mutant(
        "linear: a token has the scale of the one before",
        "kernels/input_quant.py",
        "scales_ptr + token * scales_token_stride",
        "scales_ptr + (token ^ 1) * scales_token_stride",
    ),
    Mutant(
        "linear: the input is padded at the tail only",
        "kernels/input_quant.py",
        "(column - lead)[None, :],\n",
        "column[None, :],\n",
    ),
    Mutant(
        "linear: columns are taken from one further on",
        "kernels/columns.py",
        "source = column + SHIFTS[0]",
        "source = column + SHIFTS[0] + 1",
    ),
    Mutant(
        "loading: lead is 0",
        "slices/shard.py",
        "        lead=lead,",
        "        lead=0,",
    ),
    Mutant(
        "loading: scales start a block late",
        "slices/window.py",
        "-(-total // block), shard.first_block, blocks",
        "-(-total // block), min(shard.first_block + 1, -(-total // block) - blocks), "
        "blocks",
    ),
    Mutant(
        "loading: the last column is lost",
        "loading/sliced_tensor.py",
        "self.slot(data).copy_(tensor)",
        "self.slot(data).copy_(tensor)[..., -1:] *= 0",
    ),
    Mutant(
        "loading: the first row is lost",
        "loading/sliced_tensor.py",
        "self.slot(data).copy_(tensor)",
        "self.slot(data).copy_(tensor)[self.windows[0].lead] *= 0",
    ),
    Mutant(
        "loading: gate and up are swapped",
        "methods/experts.py",
        'shards = ["w1", "w3"] if',
        'shards = ["w3", "w1"] if',
    ),
    Mutant(
        "loading: logical shards lie in another order",
        "loading/linear_loader.py",
        "SlicedTensor(name, index, kind",
        "SlicedTensor(name, len(outputs) - 1 - index, kind",
    ),
    Mutant(
        "loading: adapters lie at the start of their buffers",
        "loading/lora_slices.py",
        "window.cut(part, dim)",
        "window.without_padding().cut(part, dim)",
    ),
    Mutant(
        "quantizing: scales are a bit too large",
        "kernels/fp8_quant.py",
        "tl.maximum(absmax, 1e-10), 448.0",
        "tl.maximum(absmax, 1e-10), 440.0",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run the gates on each mutant; return 1 unless each notices all that are given."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gates", nargs="+", metavar="NAME=COMMAND")
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    args = parser.parse_args(argv)
    gates = dict(gate.split("=", 1) for gate in args.gates)
    wrong = 0
    for mutant in (None, *(m for m in MUTANTS if args.only in m.what)):
        print(mutant.what if mutant else "no mutant", flush=True)
        for name, command in gates.items():
            noticed = _notices(name, mutant, command)
            wrong += noticed == (mutant is None)
    return 1 if wrong else 0


def _notices(name: str, mutant: Mutant | None, command: str) -> bool:
    """Run a gate; print whether it fails, and by which line."""
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        shutil.copytree(REPOSITORY, tree, ignore=LEFT_OUT)
        if mutant:
            mutate(tree / PACKAGE / mutant.file, mutant)
        started = time.monotonic()
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Ahead of an installed vllm_patch, in the command's own processes too.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            command,
            shell=True,
            cwd=tree,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    word = "notices" if done.returncode else "passes"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(f"  {name} {word}, {time.monotonic() - started:.0f} s: {last}", flush=True)
    return done.returncode != 0


def mutate(file: Path, mutant: Mutant) -> None:
    """Apply a mutation; raise ValueError where there is nothing to change."""
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.what}: {file} has not one {mutant.old!r}")
    file.write_text(text.replace(mutant.old, mutant.new))


if __name__ == "__main__":
    sys.exit(main())
