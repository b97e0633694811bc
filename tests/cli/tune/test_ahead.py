"""That what is compiled ahead is what a launch looks for, by Triton's own cache."""

import subprocess
import sys

SCRIPT = """
import os
from types import SimpleNamespace
import torch, triton, triton.language as tl
import vllm.triton_utils
vllm.triton_utils.tl, vllm.triton_utils.triton = tl, triton
from vllm_patch.cli.tune import ahead
from vllm_patch.cli.tune.cases import Case
from vllm_patch.fp8_tp_padding.kernels import masked_moe
from vllm_patch.fp8_tp_padding.kernels.fp8_quant import FP8
from vllm_patch.fp8_tp_padding.kernels.tiles import SortedTiles, Tile

shard = Case(4, 2, 256, 384, 2).shard
problem = masked_moe.Problem(512, 2, 256, 4, shard, torch.bfloat16)
tile = Tile(64, 4, 2, swap=True)
swapped = SortedTiles(16, tile, tile, 2)
specialized = SortedTiles(64, tile, tile, 2, specialized=True)
calls = [(problem, swapped), (problem, specialized)]
with ahead.Compilers(90) as compilers:
    begun = compilers.compile([*calls, *calls])
    for each in begun:
        each.result()
    again = compilers.compile(calls)
found = sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))

ahead.compile_for(90)
triton.runtime.driver.active.utils = SimpleNamespace(
    get_device_properties=lambda device: {"multiprocessor_count": 132}
)
x, codes, scale, ids = (
    torch.zeros(16, dtype=t) for t in (torch.bfloat16, FP8, torch.float32, torch.int32)
)
tensors = {"x": x, "out": x, "topk_ids": ids, "topk_weights": scale}
tensors |= {"w13": codes, "w2": codes, "w13_scale": scale, "w2_scale": scale}
launched = 0
for call in calls:
    plan = masked_moe.plan_for(*call)
    of = {n: torch.zeros(16, dtype=t) for n, (_, t) in plan.buffers().items()}
    for launch in plan.launches():
        try:
            launch.through_triton({**tensors, **of})
        except AttributeError as error:  # There is no driver that could load it.
            launched += "launcher_cls" in str(error)
is_same = sorted(os.listdir(os.environ["TRITON_CACHE_DIR"])) == found
print(len(begun), len(again), launched, is_same)
"""


def test_a_launch_finds_what_was_compiled(tmp_path, monkeypatch):
    """Kernels of two plans, those in both once; their launches then compile nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True
    )
    # Some releases of vLLM log to the same stream.
    assert done.stdout.splitlines()[-1:] == ["8 0 10 True"], done.stderr
