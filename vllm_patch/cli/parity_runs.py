# SPDX-License-Identifier: Apache-2.0
"""Which four engines ``parity`` compares, and on which checkpoints."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_patch.cli.engine_process import EngineProcess
from vllm_patch.cli.errors import UsageError
from vllm_patch.cli.model_config import ModelConfig

PROMPTS, PROMPT_TOKENS = 8, 96
# One prompt at a time instead of all: the same model, summed in another order.
ONE_BY_ONE = {"max_num_seqs": 1}


class Checkpoints:
    """The checkpoint of ``--model``, or synthetic ones, written when first asked for.

    Args:
        given: The folder of ``--model``, or None.
        config: Its config, or that of the synthetic ones.
        work: A folder for synthetic ones.
        say: Called with a line on what is being written.

    """

    def __init__(
        self,
        given: Path | None,
        config: ModelConfig,
        work: Path,
        say: Callable[[str], None],
    ):
        self.given, self.config, self.work, self.say = given, config, work, say
        self._written: dict[str, Path] = {}

    def plain(self) -> Path:
        """Return the checkpoint that is to be served."""
        return self.given or self._write("checkpoint", self.config)

    def wide(self, tp: int) -> Path:
        """Return the same model, widened by zeros until ``tp`` cuts no MLP of it."""
        return self._write(f"widened-for-tp-{tp}", self.config.widened(tp))

    def _write(self, name: str, wide: ModelConfig) -> Path:
        from vllm_patch.cli.synthetic import write_checkpoint

        if name not in self._written:
            self.say(f"writing a synthetic checkpoint: {_sizes(wide)}")
            (self.work / name).mkdir()
            write_checkpoint(self.config, self.work / name, wide)
            self._written[name] = self.work / name
        return self._written[name]


def _sizes(config: ModelConfig) -> str:
    return ", ".join(f"{name} {size}" for name, size in config.mlp_sizes.items())


class Runs:
    """The runs by role, with a baseline and a control that stock vLLM can serve.

    Args:
        args: The command's.
        config: The model's.
        is_on_cpu: Whether vLLM is a build for CPUs.

    Raises:
        UsageError: A size is of no use, or there is nothing to judge by. Nothing was
            written or started.

    """

    def __init__(self, args: argparse.Namespace, config: ModelConfig, is_on_cpu: bool):
        self.args, self.config, self.is_on_cpu = args, config, is_on_cpu
        self._check_sizes()
        self.baseline_tp = args.baseline_tp
        self.control_tp = args.control_tp or self._control_tp()
        self._check_measures()

    def processes(self, checkpoints: Checkpoints) -> dict[str, EngineProcess]:
        """Return the runs in the order they are made; write what they serve."""
        tp, baseline_tp = self.args.tp, self.baseline_tp
        baseline, how = self._stock(checkpoints, baseline_tp)
        runs = {
            "baseline": EngineProcess(f"stock TP {baseline_tp}{how}", baseline),
            "control": self._control(checkpoints),
        }
        engine = self._engine(checkpoints.plain(), tp)
        return {
            **runs,
            "stock": EngineProcess(f"stock TP {tp}", engine),
            "patched": EngineProcess(f"patched TP {tp}", engine, patched=True),
        }

    def _control(self, checkpoints: Checkpoints) -> EngineProcess:
        engine, how = self._stock(checkpoints, self.control_tp)
        if self.control_tp == self.baseline_tp:
            engine, how = {**engine, **ONE_BY_ONE}, f"{how}, prompt by prompt"
        return EngineProcess(f"stock TP {self.control_tp}{how} (control)", engine)

    def _stock(self, checkpoints: Checkpoints, tp: int) -> tuple[dict[str, Any], str]:
        """Return an engine that stock serves at ``tp``, and how it comes to."""
        if not self.config.cuts(tp):
            return self._engine(checkpoints.plain(), tp), ""
        if checkpoints.given is None:
            return self._engine(checkpoints.wide(tp), tp), ", widened"
        engine = self._engine(checkpoints.plain(), tp)
        return {**engine, "enable_expert_parallel": True}, " + expert parallel"

    def _engine(self, model: Path, tp: int) -> dict[str, Any]:
        common = {
            "model": str(model),
            "max_model_len": 2 * PROMPT_TOKENS,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "seed": 0,
            **self.args.engine_args,
        }
        return {**common, "tensor_parallel_size": tp}

    def _serves_stock(self, tp: int) -> bool:
        """Whether stock serves the model at ``tp``, in whichever form."""
        config = self.config
        if config.widened(tp).undivided(tp):
            return False
        if not config.cuts(tp):
            return True
        if self.args.model is None:
            return not config.cuts_attention(tp)
        whole_experts = config.cuts_experts_only(tp) and not config.cuts(1)
        return whole_experts and not self.is_on_cpu

    def _control_tp(self) -> int:
        """Return the largest size that needs no other form, else the largest.

        If there is none but the baseline's, that: its prompts can be batched
        otherwise.
        """
        sizes = [
            size
            for size in range(2, self.args.tp + 1)
            if size != self.args.baseline_tp and self._serves_stock(size)
        ]
        as_it_is = [size for size in sizes if not self.config.cuts(size)]
        return max(as_it_is or sizes, default=self.args.baseline_tp)

    def _check_sizes(self) -> None:
        args, config = self.args, self.config
        if not config.cuts(args.tp):
            raise UsageError(
                f"--tp {args.tp} keeps the quant blocks of {config.path} whole: stock "
                "vLLM serves it, and there is nothing to compare."
            )
        if undivided := config.undivided(args.tp):
            raise UsageError(f"--tp {args.tp} does not divide {undivided}.")

    def _check_measures(self) -> None:
        for option, size in (
            ("--baseline-tp", self.baseline_tp),
            ("--control-tp", self.control_tp),
        ):
            if undivided := self.config.widened(size).undivided(size):
                raise UsageError(f"{option} {size} does not divide {undivided}.")
            if not self._serves_stock(size):
                raise UsageError(
                    f"{option} {size} cuts quant blocks of {self.config.path}, so "
                    f"stock vLLM is no measure there; {self._advice()}"
                )

    def _advice(self) -> str:
        sizes = range(1, self.args.tp + 1)
        if able := [str(size) for size in sizes if self._serves_stock(size)]:
            return f"it is at {', '.join(able)}."
        if self.args.model:
            return (
                f"nor at any up to {self.args.tp}. With --config in place of --model, "
                "there may be one: it can widen a model by zeros."
            )
        return f"nor at any up to {self.args.tp}: there is nothing to judge by."


def prompts(vocab_size: int) -> list[list[int]]:
    """Return what each run scores: token ids, the same ones each time."""
    draw = random.Random(0)
    return [
        [draw.randrange(3, vocab_size) for _ in range(PROMPT_TOKENS)]
        for _ in range(PROMPTS)
    ]
