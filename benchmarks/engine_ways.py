"""Ways and modes of ``benchmarks.engine``, and what a process is told of them."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.engine_models import Model
from vllm_patch.cli.engine_run import ON_CPU

RANK = 1
BATCHES = {16: [1, 4, 16, 64, 256], 1024: [1, 4, 16, 64, 256], 16384: [1, 16]}
# Of each engine that is measured or compared.
COMMON = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    # A step ends with its tokens.
    "async_scheduling": False,
    "disable_log_stats": True,
    "seed": 0,
}
# Of one rank, which has nobody to reduce with.
ALONE = {"disable_custom_all_reduce": True}
GRAPH_SIZES = [1, 4, 16, 64, 256, 512]
MODES: dict[str, dict[str, Any]] = {
    "compiled": {"compilation_config": {"cudagraph_capture_sizes": GRAPH_SIZES}},
    "graphs": {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": GRAPH_SIZES,
        }
    },
    "eager": {"enforce_eager": True},
}
MODES["served"] = MODES["compiled"]


@dataclass(frozen=True)
class Load:
    """What engines are asked for.

    Attributes:
        prompts: Tokens of prompts that are alone.
        batches: By tokens of context, numbers of sequences that decode.
        mixed: A prompt is measured beside sequences that decode, too.
        concurrent: Numbers of clients' sequences at a time.
        served: Tokens of each of those, in and out.
        engine: Arguments of ``vllm.LLM`` with room for it.

    """

    prompts: list[int]
    batches: dict[int, list[int]]
    mixed: bool
    concurrent: list[int]
    served: tuple[int, int]
    engine: dict[str, int]


LOAD = Load(
    prompts=[16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384],
    batches=BATCHES,
    mixed=True,
    concurrent=[1, 16, 64, 256],
    served=(1024, 1024),
    engine={
        "max_model_len": 20000,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 256,
    },
)
SMALL = Load(
    prompts=[16],
    batches={32: [1, 4]},
    mixed=False,
    concurrent=[4],
    served=(16, 8),
    # For what is compared, and called.
    engine={"max_model_len": 2100, "max_num_batched_tokens": 2100, "max_num_seqs": 4},
)


@dataclass(frozen=True)
class Way:
    """How a rank's share of a model is served.

    Attributes:
        environment: Variables that choose it.
        engine: Arguments of ``vllm.LLM``, likewise.
        halves: It has half the TP size.

    """

    environment: dict[str, str]
    engine: dict[str, Any]
    halves: bool = False


def _padding(mode: str) -> dict[str, str]:
    return {"VLLM_FP8_TP_PADDING": mode}


WAYS = {
    "this": Way(_padding("auto"), {}),
    "padded": Way(_padding("padded"), {}),
    "refined": Way(_padding("off"), {}),
    "ep": Way(_padding("off"), {"enable_expert_parallel": True}),
    "half": Way(_padding("off"), {}, halves=True),
    "deep_gemm": Way(
        {
            **_padding("auto"),
            "VLLM_USE_DEEP_GEMM": "1",
            "VLLM_DEEP_GEMM_WARMUP": "skip",
        },
        {"moe_backend": "deep_gemm"},
    ),
}


def spec_of(
    model: Model, mode: str, way: str, args: argparse.Namespace, **measures: Any
) -> dict[str, Any]:
    """Return what a process is told, but for the checkpoint."""
    chosen = WAYS[way]
    engine = {
        **COMMON,
        **args.load.engine,
        # vLLM's choice on Hopper; elsewhere FlashInfer's might be.
        "attention_backend": "FLASH_ATTN",
        **MODES[mode],
        **chosen.engine,
    }
    if not torch.cuda.is_available():
        del engine["attention_backend"]
        engine |= ON_CPU
    tp_size = model.tp_size // (1 + chosen.halves)
    if args.gpus == 1:
        alone = {"tp_size": tp_size, "rank": RANK}
        return {**alone, "engine": {**engine, **ALONE}, **measures}
    return {"engine": {**engine, "tensor_parallel_size": tp_size}, **measures}
