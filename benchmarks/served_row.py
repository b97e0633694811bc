"""A process of ``benchmarks.engine_features``: an engine, and its logits.

``python -m benchmarks.served_row SPEC OUT`` reads a JSON object, and writes a line.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import engine_row

# How often all is served.
TURNS = 2


def run(spec: dict[str, Any], known: Callable[[dict[str, Any]], None]) -> None:
    """Serve a spec's batches with each of its adapters; save logits of all steps."""
    with noted_uses() as uses:
        engine, _ = engine_row.start(spec)
        logits = [
            [served(engine, spec, index, adapter) for _ in range(TURNS)]
            for index, adapter in enumerate(spec["adapters"])
        ]
    torch.save(logits, spec["logits"])
    known({"experts": engine_row.experts_of(engine.model), "uses": dict(+uses)})


def served(
    engine: engine_row.Engine, spec: dict[str, Any], index: int, adapter: str | None
) -> list[torch.Tensor]:
    """Return each step's logits; prompts are the same each time."""
    lora = None
    if adapter:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(Path(adapter).name, index, adapter)
    again = engine_row.Engine(engine.llm, engine.vocab_size)
    with engine_row.noted_logits(again) as found:
        for batch, length in spec["batches"]:
            again.serve(batch * [length], spec["tokens"], lora)
    return found


@contextlib.contextmanager
def noted_uses() -> Iterator[Counter[str]]:
    """Count shared experts on a stream of their own, and dependent launches."""
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
    from vllm_patch.fp8_tp_padding.kernels import masked_moe

    uses: Counter[str] = Counter()
    if not torch.cuda.is_available():
        yield uses
        return
    forward, launch = SharedExperts.maybe_forward_async, masked_moe.dependent_launch

    def maybe_forward_async(*args, **kwargs):
        started = forward(*args, **kwargs)
        in_graph = torch.cuda.is_current_stream_capturing()
        uses["on a stream"] += started
        uses["on a stream in graphs"] += started and in_graph
        return started

    def dependent_launch(on: bool):
        uses["dependent plans"] += on
        return launch(on)

    with (
        mock.patch.object(SharedExperts, "maybe_forward_async", maybe_forward_async),
        mock.patch.object(masked_moe, "dependent_launch", dependent_launch),
    ):
        yield uses


if __name__ == "__main__":
    engine_row.main(*sys.argv[1:], run)
