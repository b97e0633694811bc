# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No call compiles a kernel, after a first one with the most tokens."""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels import (
    hopper_gate_up,
    launches,
    masked_experts,
    masked_moe,
    masked_warmup,
    tile_choice,
    tuned_tiles,
    workspace,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.kernels.tiles import (
    PairTiles,
    SortedTiles,
    Tile,
)
from vllm.model_executor.layers.quantization.fp8_tp_padding.slices.shard import (
    block_shard,
)

from .experts import Checkpoint
from .tensor_parallel import runs_kernels
from .test_moe_forward import EXPERTS, HIDDEN, TOKENS, layer_output, routing
from .triton_keys import record

pytestmark = runs_kernels

MOST = 16384
SIZES = {
    "tuned": (128, 8, 4096, 1536, 8),
    "rule": (128, 8, 2048, 768, 8),
    "top-10 of 512": (512, 10, 2048, 640, 8),
    "three blocks": (160, 8, 6144, 2560, 8),
    "top-1 of 1024": (1024, 1, 2048, 1536, 8),
}


class Calls:
    """Calls of one rank's experts, of 1 to MOST tokens, in one set of tensors."""

    def __init__(self, experts, top_k, hidden, total, tp_size, ids=torch.int32):
        shard = block_shard(total, 128, 1, tp_size)
        self.sizes = top_k, experts, hidden, shard
        self.problem = top_k, hidden, experts, shard, torch.bfloat16
        self.out, self.x = torch.empty(2, MOST, hidden, dtype=torch.bfloat16)
        codes, scales = torch.empty(1, dtype=torch.float8_e4m3fn), torch.empty(1)
        self.weights = masked_moe.Weights(codes, codes, scales, scales)
        routed = torch.empty(MOST, top_k), torch.empty(MOST, top_k, dtype=ids)
        self.routing = masked_moe.Routing(*routed)
        needed = self.plan_of(MOST).workspace_bytes
        self.workspace = torch.empty(needed, dtype=torch.uint8)

    def plan_of(self, tokens):
        problem = masked_moe.Problem(tokens, *self.problem)
        return masked_moe.plan_for(problem, tile_choice.tiles_for(tokens, *self.sizes))

    def tensors(self, tokens):
        """As vLLM makes them: each starts where an allocation does."""
        part = slice(tokens)
        routed = self.routing.weights[part], self.routing.ids[part]
        routing = masked_moe.Routing(*routed)
        return self.out[part], self.x[part], self.weights, routing, self.workspace

    def run(self, tokens):
        self.plan_of(tokens).run(*self.tensors(tokens))

    def warm_up(self, tokens=MOST):
        return masked_warmup.warm_up(self.plan_of, *self.tensors(tokens))


@pytest.fixture(autouse=True)
def compiles(monkeypatch):
    """Warm up as on a GPU, in a process that has not."""
    monkeypatch.setattr(masked_warmup, "_compiles", lambda x: True)
    monkeypatch.setattr(masked_warmup, "_warm", {})


@pytest.fixture
def tiles(monkeypatch):
    """Return a function that decides where tiles come from."""

    def come_from(tuned: dict, hopper: bool):
        monkeypatch.setattr(tile_choice, "tuned_tiles", lambda *sizes: tuned)
        platform = SimpleNamespace(is_device_capability=lambda capability: hopper)
        monkeypatch.setattr(tile_choice, "current_platform", platform)

    return come_from


@pytest.fixture
def launched(monkeypatch):
    """Return the keys of what is launched; nothing is run."""
    monkeypatch.setattr(masked_moe, "hopper_gate_up", lambda: hopper_gate_up)
    monkeypatch.setattr(launches, "_multiprocessors", lambda: 132)
    return record(monkeypatch, masked_moe, hopper_gate_up)


def tuned_for_h200():
    name = "E=128,N=192,device_name=NVIDIA_H200,*masked,*"
    paths = [path for folder in tuned_tiles._FOLDERS for path in folder.glob(name)]
    return tuned_tiles.read_config(paths[0])


def not_warm(calls, launched, most=MOST):
    """Return numbers of tokens, up to the most, that compile after a warm-up."""
    calls.warm_up()
    warm = set(launched)
    found = []
    for tokens in range(1, most + 1):
        launched.clear()
        calls.run(tokens)
        if not launched <= warm:
            found.append(tokens)
    return found


@pytest.mark.parametrize(
    ("name", "hopper", "binaries"),
    [
        ("tuned", True, 42),
        ("rule", True, 33),
        ("rule", False, 25),
        ("top-10 of 512", True, 27),
        ("three blocks", True, 30),
    ],
)
def test_no_number_of_tokens_compiles(tiles, launched, name, hopper, binaries):
    tiles(tuned_for_h200() if name == "tuned" else {}, hopper)
    calls = Calls(*SIZES[name])
    calls.warm_up()
    assert len(launched) == binaries
    assert not_warm(calls, launched) == []


TILE = Tile(64, 4, 3)
# Of 257 to 384 tokens, eight parts would need more than sorted pairs of 385.
SPLIT = {256: PairTiles(TILE, TILE, 8), 512: SortedTiles(16, TILE, TILE)}
MANY = 2560


@pytest.mark.parametrize("name", ["tuned", "rule", "top-1 of 1024", "split"])
def test_the_workspace_of_the_largest_call_does_for_all(tiles, name):
    tuned = {"tuned": tuned_for_h200(), "split": SPLIT}
    tiles(tuned.get(name, {}), True)
    masked_experts.planned.cache_clear()
    masked_experts._bytes_of_few.cache_clear()
    sizes = SIZES.get(name, SIZES["rule"])
    top_k, experts, hidden, shard = Calls(*sizes).sizes
    sizes = top_k, hidden, experts, shard, torch.bfloat16
    needed = 0
    for most in range(1, MANY):
        plan = masked_experts._plan(most, *sizes)
        needed = max(needed, workspace.bytes_of(plan.buffers()))
        assert masked_experts.workspace_bytes(most, *sizes) == needed


def test_a_variant_that_is_left_out_shows(tiles, launched, monkeypatch):
    tiles(tuned_for_h200(), True)
    stock = masked_warmup.variants

    def all_but_one(*args):
        plans = stock(*args)
        return [plan for plan in plans if plan.problem.num_tokens != 769]

    monkeypatch.setattr(masked_warmup, "variants", all_but_one)
    found = not_warm(Calls(*SIZES["tuned"]), launched, most=2048)
    assert found == [*range(769, 1537)]


def test_chunks_that_are_left_out_show(tiles, launched, monkeypatch):
    tiles(tuned_for_h200(), True)
    without = property(lambda plan: (plan.tiles, plan.searched))
    monkeypatch.setattr(masked_moe.SortedPlan, "variant", without)
    found = not_warm(Calls(*SIZES["tuned"]), launched, most=512)
    assert found[0] == 129  # More than one chunk.


def test_once_for_a_geometry(tiles, launched):
    """More tokens compile what is new; other dtypes and sizes, all."""
    tiles({}, True)
    calls = Calls(*SIZES["rule"])
    assert calls.warm_up(64) == 64 and launched
    launched.clear()
    assert calls.warm_up(64) == 64
    assert calls.warm_up(7) == 64
    assert not launched
    assert calls.warm_up(4096) == 4096
    assert "down_kernel" in {name for name, *_ in launched}
    launched.clear()
    assert calls.warm_up(4096) == 4096 and not launched
    for others in (
        Calls(*SIZES["rule"], ids=torch.int64),
        Calls(*SIZES["three blocks"]),
    ):
        launched.clear()
        others.warm_up(4096)
        assert launched


def test_where_nothing_compiles(monkeypatch, launched):
    """On a CPU, and while a CUDA graph is captured, which would repeat it for ever."""
    monkeypatch.undo()
    calls = Calls(*SIZES["rule"])
    assert not masked_warmup._compiles(calls.x)
    assert calls.warm_up(1) == 0
    on_gpu = SimpleNamespace(is_cuda=True)
    for captures in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda value=captures: value
        )
        assert masked_warmup._compiles(on_gpu) is not captures


def test_a_slow_start_is_explained(monkeypatch, launched):
    said = []
    monkeypatch.setattr(
        masked_warmup, "logger", SimpleNamespace(info=lambda *args: said.append(args))
    )
    calls = Calls(*SIZES["rule"])
    calls.warm_up(8)
    assert not said
    monkeypatch.setattr(masked_warmup, "LOGGED_SECONDS", -1)
    calls.warm_up(16)
    ((text, *values),) = said
    assert text % tuple(values) == (
        "Compiled 2 variants of the masked MoE kernels, for 9 to 16 tokens, in 0.0 s."
    )


def test_layers_of_one_geometry(monkeypatch):
    """The first one's first call warms up, and computes what it would otherwise."""
    runs, stock = [], masked_moe._Plan.run

    def run(plan, *args):
        runs.append(plan.problem.num_tokens)
        stock(plan, *args)

    monkeypatch.setattr(masked_moe._Plan, "run", run)
    checkpoint = Checkpoint.exact(384, experts=EXPERTS, hidden=HIDDEN)
    layer = 384, 2, 1, checkpoint, *routing()
    first, second = layer_output(*layer), layer_output(*layer)
    assert runs == [1, 2, TOKENS, TOKENS]
    assert torch.equal(first, second)


def test_a_view_that_starts_anywhere():
    """It compiles nothing either: it is copied to where Triton takes 16 bytes."""
    x = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert masked_experts._aligned(x) is x
    odd = x.flatten()[1:]
    aligned = masked_experts._aligned(odd)
    assert aligned.data_ptr() % 16 == 0 and torch.equal(aligned, odd)
