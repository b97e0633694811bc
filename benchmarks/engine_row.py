"""Rows of ``benchmarks.engine``: a process with one engine, and what it measures.

``python -m benchmarks.engine_row SPEC OUT`` reads a JSON object, and writes a row's to
each line of the other file as soon as it is known.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.one_rank import engine_is_rank_of
from benchmarks.random_routing import route_at_random
from vllm_patch import plugin
from vllm_patch.cli.cpu_fp8 import operators

Row = dict[str, Any]

GIB = 2**30
# The last row of a process that measured all it was told to.
END = "total_s"
# Steps that are timed after the first ones of a batch, and of all prompts at a time.
DECODE_STEPS = 32
SKIPPED_STEPS = 3
PREFILLS = 5
MIXED = 64, 2048
MIXED_STEPS = 8
CALLED_TOKENS = 16, 512, 2048
# Prompts whose logits are checked, each in a step of its own.
CHECKED_PROMPTS = 1, 4, 17, 64, 400, 2048


@dataclass
class Engine:
    """vLLM's engine in this process, which is stepped by hand."""

    llm: Any
    vocab_size: int
    requests: int = 0

    @property
    def runner(self):
        executor = self.llm.llm_engine.model_executor
        return executor.driver_worker.worker.model_runner

    @property
    def model(self) -> torch.nn.Module:
        return self.runner.model

    def add(self, length: int, tokens: int, lora: Any = None) -> None:
        """Ask for ``tokens`` after a prompt of ``length`` that no other starts with."""
        from vllm import SamplingParams

        self.requests += 1
        first = 3 + self.requests % (self.vocab_size - 3)
        ids = [
            3 + (first * 7919 + 31 * i) % (self.vocab_size - 3) for i in range(length)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": ids}
        self.llm.llm_engine.add_request(
            str(self.requests), prompt, sampling, lora_request=lora
        )

    def step(self) -> tuple[float, int]:
        """Return a step's seconds, and how many sequences got a token."""
        started = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        return time.perf_counter() - started, len(outputs)

    def serve(self, prompts: list[int], tokens: int, lora: Any = None) -> None:
        """Serve prompts of these lengths to the end."""
        for length in prompts:
            self.add(length, tokens, lora)
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[tuple[float, int]]:
        """Step until nothing is left to do."""
        while self.llm.llm_engine.has_unfinished_requests():
            yield self.step()


def run(spec: dict[str, Any], known: Callable[[Row], None]) -> None:
    """Start a spec's engine, and measure what the spec names.

    Args:
        spec: What to serve, and what to measure.
        known: Gets each row once it is known.

    """
    engine, seconds = start(spec)
    if "logits" in spec:
        torch.save(logits(engine), spec["logits"])
    for length in spec.get("sweep", ()):
        engine.serve([length], tokens=2)
    for batch in spec.get("batches", ()):
        engine.serve(batch * [16], tokens=4)
    rank = engine.llm.collective_rpc(on_rank)[-1]
    for found in measured(spec, engine, seconds, rank):
        if found:
            known({**found, "experts": rank["experts"]})


def measured(
    spec: dict[str, Any], engine: Engine, load_seconds: float, rank: dict[str, Any]
) -> Iterator[Row | None]:
    """Yield rows in the order they are known; None or an empty one: left out."""
    yield {"measure": "load_s", "value": load_seconds}
    yield from sizes(engine, rank)
    for prompt in spec.get("prefill", ()):
        yield prefill(engine, prompt)
    for context, batches in spec.get("decode", {}).items():
        for batch in batches:
            yield decode(engine, int(context), batch)
    if spec.get("mixed"):
        yield mixed(engine)
    if spec.get("calls"):
        yield from (called(engine, tokens) for tokens in CALLED_TOKENS)


def start(spec: dict[str, Any]) -> tuple[Engine, float]:
    """Build ``LLM(**spec["engine"])``; return it, and the seconds it took.

    Where the spec has a rank, the engine is that one, alone; where it says so, tokens
    go to random experts.
    """
    import vllm

    plugin.register()
    if "rank" in spec:
        engine_is_rank_of(spec["tp_size"], spec["rank"])
    if spec.get("random_routing"):
        route_at_random()
    started = time.monotonic()
    llm = vllm.LLM(**spec["engine"])
    seconds = time.monotonic() - started
    say(f"engine is up after {seconds:.0f} s")
    return Engine(llm, llm.llm_engine.model_config.get_vocab_size()), seconds


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def experts_of(model: torch.nn.Module) -> str:
    """Name the class that runs the routed experts, and how many columns it has."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        # LoRA puts another one around it, and around the layer.
        method = getattr(method, "old_quant_method", method)
        kernel = getattr(method, "experts_cls", None)
        if kernel and hasattr(module, "w2_weight"):
            return f"{kernel.__name__} {module.w2_weight.shape[-1]}"
    return ""


def on_rank(worker) -> dict[str, Any]:
    """Return what only a rank's process knows of its experts and its memory."""
    from vllm.v1.worker.workspace import current_workspace_manager

    model = worker.get_model()
    weights = {t.data_ptr(): t.nbytes for t in model.parameters()}
    found = {"experts": experts_of(model), "weights_gib": sum(weights.values()) / GIB}
    if torch.cuda.is_available():
        workspaces = current_workspace_manager()._current_workspaces
        used = sum(w.nbytes for w in workspaces if w is not None)
        found["workspace_gib"] = used / GIB
    return found


def sizes(engine: Engine, rank: dict[str, Any]) -> list[Row]:
    cache = engine.llm.llm_engine.vllm_config.cache_config
    rows = {
        **{name: value for name, value in rank.items() if name.endswith("_gib")},
        "kv_blocks": cache.num_gpu_blocks,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
    }
    return [{"measure": name, "value": value} for name, value in rows.items()]


def prefill(engine: Engine, length: int) -> dict[str, Any]:
    """Time to the first token of a prompt that is alone."""
    times = []
    for _ in range(1 + PREFILLS):
        engine.add(length, tokens=1)
        times.append(sum(seconds for seconds, _ in engine.steps()))
    return row("prefill_ms", times[1:], tokens=length)


def decode(engine: Engine, context: int, batch: int) -> dict[str, Any] | None:
    """Time of a step in which each of ``batch`` sequences gets a token."""
    cache = engine.llm.llm_engine.vllm_config.cache_config
    tokens = SKIPPED_STEPS + DECODE_STEPS + 1
    if batch * (context + tokens) > cache.num_gpu_blocks * cache.block_size:
        say(f"{batch} sequences of {context} tokens: more than the KV cache holds")
        return None
    for _ in range(batch):
        # What is prefilled first has to go on until the last one is.
        engine.add(context, tokens=tokens + prefill_steps(engine, context, batch))
    # All have got their first token once all get one in a step.
    times = [seconds for seconds, got in engine.steps() if got == batch]
    timed = times[1 + SKIPPED_STEPS :][:DECODE_STEPS]
    return row("decode_ms", timed, tokens=batch, context=context)


def prefill_steps(engine: Engine, context: int, batch: int) -> int:
    scheduler = engine.llm.llm_engine.vllm_config.scheduler_config
    return -(-batch * (context + 1) // scheduler.max_num_batched_tokens) + 1


def mixed(engine: Engine) -> dict[str, Any]:
    """Time of a step with a prompt's prefill beside sequences that decode."""
    batch, length = MIXED
    for _ in range(batch):
        engine.add(1024, tokens=100)
    while engine.step()[1] < batch:
        pass
    times = []
    for _ in range(1 + MIXED_STEPS):
        engine.add(length, tokens=1)
        times.append(engine.step()[0])
        engine.step()
    for _ in engine.steps():
        pass
    return row("mixed_ms", times[1:], tokens=batch + length, context=1024)


def row(measure: str, times: list[float], **where: int) -> dict[str, Any]:
    """Return median and slowest tenth of seconds, in milliseconds."""
    found = sorted(1e3 * seconds for seconds in times)
    median, p90 = statistics.median(found), found[int(0.9 * len(found))]
    say(f"{measure} {where}: {median:.2f}, p90 {p90:.2f}")
    return {"measure": measure, **where, "value": median, "p90": p90}


def called(engine: Engine, length: int) -> dict[str, Any]:
    """CPU time of a call of the routed experts, in a prefill that is not compiled."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

    times: list[list[float]] = []
    stock = FusedMoEKernel.apply

    def apply(*args, **kwargs):
        started = time.perf_counter()
        out = stock(*args, **kwargs)
        times[-1].append(time.perf_counter() - started)
        return out

    with mock.patch.object(FusedMoEKernel, "apply", apply):
        for _ in range(1 + PREFILLS):
            times.append([])
            engine.serve([length], tokens=1)
    # Nothing is called where a graph is replayed.
    each = [statistics.mean(calls) for calls in times[1:] if calls]
    return row("experts_call_ms", each, tokens=length) if each else {}


def logits(engine: Engine) -> torch.Tensor:
    """Return the logits of prompts' last tokens: float32 ``[prompts, vocabulary]``."""
    with noted_logits(engine) as found:
        for length in CHECKED_PROMPTS:
            engine.serve([length], tokens=1)
    return torch.cat(found)


@contextlib.contextmanager
def noted_logits(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """Give a list that gets each step's logits: float32 ``[rows, vocabulary]``."""
    found: list[torch.Tensor] = []
    stock = type(engine.model).compute_logits

    def compute_logits(model, *args, **kwargs):
        out = stock(model, *args, **kwargs)
        found.append(out.detach().float().cpu())
        return out

    with mock.patch.object(type(engine.model), "compute_logits", compute_logits):
        yield found


def main(spec: str, out: str, measure: Callable = run) -> None:
    """Write each row of ``measure(spec, known)`` at once, and one that ends them."""
    started = time.monotonic()
    with open(out, "w") as file:

        def known(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        measure(json.loads(Path(spec).read_text()), known)
        known({"measure": END, "value": time.monotonic() - started})


if __name__ in ("__main__", "__mp_main__"):  # The latter in processes it spawns.
    operators.install()

if __name__ == "__main__":
    main(*sys.argv[1:])
