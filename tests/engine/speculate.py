"""Generates with a draft model, and writes how much of what it drafted was right.

``python -m tests.engine.speculate SPEC OUT``: SPEC has the arguments for ``vllm.LLM``
and the prompts, of token ids.
"""

import json
import sys
from pathlib import Path

from vllm_patch.cli.cpu_fp8 import operators

NEW_TOKENS = 16
PREFIX = "vllm:spec_decode_num_"


def run(spec: dict) -> dict[str, int]:
    """Return the tokens that were drafted, and those of them that were accepted."""
    from vllm import LLM, SamplingParams
    from vllm_patch.cli.engine_run import ON_CPU

    llm = LLM(**ON_CPU, **spec["engine"], disable_log_stats=False)
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    llm.generate(prompts, sampling, use_tqdm=False)
    values = {each.name: getattr(each, "value", None) for each in llm.get_metrics()}
    return {kind: values[f"{PREFIX}{kind}_tokens"] for kind in ("draft", "accepted")}


if __name__ in ("__main__", "__mp_main__"):  # The latter in processes it spawns.
    operators.install()

if __name__ == "__main__":
    spec_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(run(json.loads(spec_file.read_text()))))
