"""Features of the engine that need a GPU, at a cut size: logits against their twins'.

``python -m benchmarks.engine_features`` runs vLLM's engine as rank 1 of TP 8, with
small random checkpoints, and compares all logits of prompts and of tokens after them.

    lora     Qwen3-MoE, 192 columns: without an adapter, with one of the attention, and
             with one of all experts. The twin is stock, with a checkpoint and adapters
             that hold zeros around the rank's columns.
    shared   GLM-4.5-Air, 176 columns: shared experts on a stream of their own, beside
             kernels that start while the one before them ends, one by one and in CUDA
             graphs. The twin has one stream.

All is served twice: logits may differ from the twin's as much as the twin's do from its
own. Exits with 1 if they differ by more, or if a feature was not at work: its adapter
changes nothing, nothing ran on the other stream.
"""

import itertools
import json
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import engine_child, engine_ways
from benchmarks.lora_adapters import ADAPTERS, write_adapters, write_stock
from benchmarks.quantized import relative_error
from benchmarks.run import environment, parser_of
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

MODELS = Path(__file__).parent.parent / "tests" / "models"
TP, RANK = 8, engine_ways.RANK
# Sequences, and the length of their prompts: both kinds of plans.
BATCHES = [(1, 16), (4, 17), (16, 5), (64, 3), (1, 400)]
TOKENS = 24
# Less is rounding: an adapter's product is as large as its layer's.
LEAST_CHANGE = 0.05
ENGINE = {
    **engine_ways.COMMON,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    # Other processes are on the GPU, too.
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 30,
}
ON_GPU = {"attention_backend": "FLASH_ATTN"}
SHARED_MODES = {mode: engine_ways.MODES[mode] for mode in ("eager", "graphs")}
# For so few pairs an expert as of one token, tiles of the rule launch dependently.
SHARED_SIZES = {"num_hidden_layers": 3, "n_routed_experts": 64}
ONE_STREAM = {"VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1"}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("engine_features", __doc__)
    parser.add_argument("features", nargs="*", default=[*FEATURES], metavar="FEATURE")
    args = parser.parse_args(argv)
    if unknown := {*args.features} - {*FEATURES}:
        parser.error(f"no such feature: {', '.join(unknown)} ({', '.join(FEATURES)})")
    if not torch.cuda.is_available():
        parser.error("these need a CUDA GPU, and vLLM's build for it")
    for name, value in environment(None).items():
        print(f"{name:8} {value}", flush=True)
    problems = []
    for feature in args.features:
        with tempfile.TemporaryDirectory() as folder:
            found = FEATURES[feature](Path(folder))
        print(f"{'FAIL' if found else 'PASS'} {feature}", flush=True)
        problems += found
    print(f"\n{len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


# -- processes ------------------------------------------------------------------


def served(
    folder: Path, specs: dict[str, tuple[dict[str, Any], dict[str, str]]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Serve in a process for each spec, side by side.

    Args:
        folder: For logits.
        specs: By name, what ``served_row`` is told, and variables.

    Returns:
        By name, what the processes found, with ``logits`` by adapter and turn; and what
        is wrong with those that are missing.

    """

    def process(name: str) -> dict[str, Any]:
        spec, variables = specs[name]
        out = folder / f"{name}.pt"
        spec = {"tp_size": TP, "rank": RANK, "logits": str(out), **spec}
        spec = {"batches": BATCHES, "tokens": TOKENS, **spec}
        found = engine_child.process(spec, variables, "benchmarks.served_row")[0]
        return {**found, "logits": torch.load(out)}

    results, problems = {}, []
    with ThreadPoolExecutor(len(specs)) as pool:
        futures = {name: pool.submit(process, name) for name in specs}
    for name, future in futures.items():
        try:
            results[name] = future.result()
        except engine_child.RowFailed as error:
            problems.append(f"{name}: {error}")
            print(f"  {name} failed:", error.log[-4000:], sep="\n", flush=True)
    return results, problems


def engine_of(folder: Path, **arguments: Any) -> dict[str, Any]:
    on_gpu = ON_GPU if torch.cuda.is_available() else {}
    return {"model": str(folder), **ENGINE, **on_gpu, **arguments}


def differs(what: str, this: list, twin: list) -> list[str]:
    """Say how far two turns of logits are from those of a twin; return a problem.

    Any turn may be the odd one, so that the nearest two count. A twin that differs from
    itself by as much as an adapter changes tells nothing.
    """
    error = min(difference(a, b) for a, b in itertools.product(this, twin))
    noise = difference(*twin)
    print(f"  {what}: differs from its twin by {error:.1e}, the twin by {noise:.1e}")
    if error <= noise < LEAST_CHANGE:
        return []
    return [f"{what}: differs by {error:.1e}, the twin by {noise:.1e}"]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest relative difference of a step's logits."""
    pairs = zip(one, other, strict=True)
    errors = [relative_error(a, b) for a, b in pairs]
    # NaN, also where nothing is computed, is no number below a limit.
    return math.inf if any(map(math.isnan, errors)) else max(errors)


# -- LoRA -------------------------------------------------------------------------


def lora(folder: Path) -> list[str]:
    config = ModelConfig.read(MODELS / "qwen3_moe_1536.json")
    cut, stock = folder / "cut", folder / "stock"
    cut.mkdir()
    write_checkpoint(config, cut)
    write_adapters(cut)
    write_stock(config, cut, stock, RANK, TP)
    return compared_lora(folder, {"this": cut, "stock": stock}, "TritonExperts 256")


def compared_lora(folder: Path, models: dict[str, Path], experts: str) -> list[str]:
    """Compare an engine with LoRA with its twin.

    Args:
        folder: For logits.
        models: Folders of ``this`` and ``stock``, with adapters below them.
        experts: What has to run them.

    """
    arguments = {"enable_lora": True, "max_lora_rank": 8, "enforce_eager": True}
    # The last one is wrong: it shows that a wrong place would show.
    adapters = {"this": ADAPTERS, "stock": [*ADAPTERS, "tail"]}
    specs = {
        name: (
            {
                "engine": engine_of(model, **arguments),
                "adapters": [a and str(model / a) for a in (None, *adapters[name])],
            },
            {"VLLM_FP8_TP_PADDING": "auto" if name == "this" else "off"},
        )
        for name, model in models.items()
    }
    found, problems = served(folder, specs)
    if problems:
        return problems
    this, stock = (found[name]["logits"] for name in models)
    for name in models:
        print(f"  {name}: experts are {found[name]['experts']}")
        if found[name]["experts"] != experts:
            problems.append(f"lora, {name}: experts are {found[name]['experts']}")
    for index, name in enumerate(["no adapter", *ADAPTERS]):
        problems += differs(f"lora, {name}", this[index], stock[index])
    # Of the first prompt: what follows is of other tokens.
    base, *adapted = (turns[0][:1] for turns in this)
    changes = {
        a: difference(each, base) for a, each in zip(ADAPTERS, adapted, strict=True)
    }
    changes["tail"] = difference(stock[-1][0][:1], adapted[-1])
    for name, change in changes.items():
        print(f"  lora, {name}: changes logits by {change:.1e}")
        if not LEAST_CHANGE < change < math.inf:
            problems.append(f"lora, {name}: changes logits by {change:.1e}")
    return problems


# -- shared experts -----------------------------------------------------------------


def shared(folder: Path) -> list[str]:
    path = MODELS / "glm4_moe_1408.json"
    fields = {**json.loads(path.read_text()), **SHARED_SIZES}
    model = folder / "model"
    model.mkdir()
    write_checkpoint(ModelConfig(path, fields), model)
    specs = {
        f"{mode}, {streams}": (
            {"engine": engine_of(model, **arguments), "adapters": [None]},
            {"VLLM_FP8_TP_PADDING": "auto", **variables},
        )
        for mode, arguments in SHARED_MODES.items()
        for streams, variables in (("two streams", {}), ("one stream", ONE_STREAM))
    }
    found, problems = served(folder, specs)
    if problems:
        return problems
    for name, each in found.items():
        print(f"  {name}: experts are {each['experts']}; {each['uses']}")
    for mode in SHARED_MODES:
        two, one = (found[f"{mode}, {n}"] for n in ("two streams", "one stream"))
        problems += differs(f"shared, {mode}", two["logits"][0], one["logits"][0])
        needed = {"on a stream", "dependent plans", "MaskedTritonExperts 176"}
        needed |= {"on a stream in graphs"} if mode == "graphs" else set()
        if missing := needed - {*two["uses"], two["experts"]}:
            problems.append(f"shared, {mode}: not used: {', '.join(sorted(missing))}")
        if "on a stream" in one["uses"]:
            problems.append(f"shared, {mode}: the twin has two streams, too")
    return problems


FEATURES = {"lora": lora, "shared": shared}


if __name__ == "__main__":
    sys.exit(main())
