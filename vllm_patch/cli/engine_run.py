# SPDX-License-Identifier: Apache-2.0
"""One run of the real vLLM engine, in a process of its own.

``python -m vllm_patch.cli.engine_run SPEC OUT`` reads a JSON object with the
arguments for ``vllm.LLM`` and batches of prompts, and writes the log-probability and
the most likely token at every prompt position.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_patch.cli.cpu_fp8 import operators

# Graphs and compilation are for speed, and cost start-up. vLLM fills its cache with
# zeros on each rank, by default half of the memory: this holds thousands of tokens.
ON_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Score ``spec["batches"]`` (of token ids) with ``LLM(**spec["engine"])``."""
    import torch

    import vllm
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    started, defaults = time.monotonic(), {}
    if current_platform.is_cpu():
        from vllm_patch.cli.cpu_fp8 import check

        check.run()
        defaults = ON_CPU
    llm = LLM(**{**defaults, **spec["engine"]})
    loaded = time.monotonic()
    sampling = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False
    )
    outputs = []
    for batch in spec["batches"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in batch]
        outputs += llm.generate(prompts, sampling, use_tqdm=False)
    logprobs, top_tokens = [], []
    for output in outputs:
        # The first token has no prediction.
        for token, ranked in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        ):
            logprobs.append(ranked[token].logprob)
            top_tokens.append(max(ranked, key=lambda t: ranked[t].logprob))
    return {
        "logprobs": logprobs,
        "top_tokens": top_tokens,
        "load_seconds": round(loaded - started, 1),
        "run_seconds": round(time.monotonic() - loaded, 1),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": current_platform.get_device_name(),
    }


if __name__ in ("__main__", "__mp_main__"):  # The latter in processes it spawns.
    operators.install()

if __name__ == "__main__":
    spec_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(run(json.loads(spec_file.read_text()))))
