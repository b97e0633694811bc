"""That what is compiled ahead is what a launch looks for, by Triton's own cache."""

import subprocess
import sys

SCRIPT = """
import os, sys
import torch, triton, triton.language as tl
import vllm.triton_utils
vllm.triton_utils.tl, vllm.triton_utils.triton = tl, triton
from vllm_patch.cli.tune import ahead
from vllm_patch.cli.tune.cases import Case
from vllm_patch.fp8_tp_padding.kernels import masked_moe
from vllm_patch.fp8_tp_padding.kernels.tiles import SortedTiles, Tile

shard = Case(4, 2, 256, 384, 2).shard
problem = masked_moe.Problem(64, 2, 256, 4, shard, torch.bfloat16)
tile = Tile(64, 4, 2, swap=True)
tiles = SortedTiles(16, tile, tile, 2)
cache = os.environ["TRITON_CACHE_DIR"]
with ahead.Compilers(90) as compilers:
    begun = compilers.compile([(problem, tiles), (problem, tiles)])
    for each in begun:
        each.result()
    again = compilers.compile([(problem, tiles)])
found = sorted(os.listdir(cache))
ahead.compile_for(90)
launches = masked_moe.plan_for(problem, tiles)._prepared.launches
launched = 0
for launch in launches:
    tensors = {n: torch.empty(1, dtype=t, device="meta") for n, t in TYPES.items()}
    try:
        launch.through_triton(tensors)
    except AttributeError:  # No driver that could load it.
        launched += 1
is_same = sorted(os.listdir(cache)) == found
print(len(begun), len(again), launched, len(launches), is_same)
"""
TYPES = """
import torch
bf16, fp8, f32, i32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32
TYPES = dict(x=bf16, out=bf16, h=bf16, y=bf16, x_codes=fp8, w13=fp8, w2=fp8)
TYPES |= dict(x_scale=f32, w13_scale=f32, w2_scale=f32, topk_weights=f32, topk_ids=i32)
TYPES |= dict.fromkeys(("counts", "sorted_pairs", "block_experts", "num_blocks"), i32)
"""


def test_a_launch_finds_what_was_compiled(tmp_path, monkeypatch):
    """Five kernels, each once, with nothing to compile left."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", TYPES + SCRIPT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "0", "5", "5", "True"], done.stderr
