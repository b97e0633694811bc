# SPDX-License-Identifier: Apache-2.0
"""Which four engines ``parity`` compares, and on which checkpoints."""

import argparse
import random
from pathlib import Path
from typing import Any

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import command as check
from vllm_patch.cli.check.checkpoint import Checkpoint
from vllm_patch.cli.check.verdict import Verdict
from vllm_patch.cli.engine_process import EngineProcess, say
from vllm_patch.cli.model_config import ModelConfig

# Prompts and their tokens, together or each in a call of its own: kernels differ for
# few tokens, which GPUs run as captured graphs.
TOGETHER = (8, 96)
ALONE = (16, 4), (8, 16)
# One prompt at a time instead of all: the same model, summed in another order.
ONE_BY_ONE = {"max_num_seqs": 1}


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
        self._as_it_is = self._derived(config, args.tp)
        self._check_sizes()
        self.baseline_tp = args.baseline_tp
        self.control_tp = args.control_tp or self._control_tp()
        self._check_measures()

    def processes(self, work: Path) -> dict[str, EngineProcess]:
        """Return the runs in the order they are made.

        Args:
            work: Where synthetic checkpoints for them are written.

        """
        tp, baseline_tp, control_tp = self.args.tp, self.baseline_tp, self.control_tp
        baseline, how = self._stock(work, baseline_tp)
        control, control_how = self._stock(work, control_tp)
        if control_tp == baseline_tp:
            control |= ONE_BY_ONE
            control_how += ", prompt by prompt"
        control_label = f"stock TP {control_tp}{control_how} (control)"
        engine = self._engine(work, tp)
        return {
            "baseline": EngineProcess(f"stock TP {baseline_tp}{how}", baseline),
            "control": EngineProcess(control_label, control),
            "stock": EngineProcess(f"stock TP {tp}", engine),
            "patched": EngineProcess(f"patched TP {tp}", engine, patched=True),
        }

    def _stock(self, work: Path, tp: int) -> tuple[dict[str, Any], str]:
        """Return an engine that stock serves at ``tp``, and how it comes to."""
        if _is_whole(self._verdict(tp)):
            return self._engine(work, tp), ""
        if self.args.model is None:
            return self._engine(work, tp, widened=True), ", widened"
        engine = {**self._engine(work, tp), "enable_expert_parallel": True}
        return engine, " + expert parallel"

    def _engine(self, work: Path, tp: int, widened: bool = False) -> dict[str, Any]:
        model = self.args.model or self._synthetic(work, tp if widened else None)
        return {
            "model": str(model),
            "max_model_len": 2 * TOGETHER[1],
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "seed": 0,
            **self.args.engine_args,
            "tensor_parallel_size": tp,
        }

    def _synthetic(self, work: Path, tp: int | None) -> Path:
        """Return a checkpoint, or one widened until that TP size cuts no MLP of it."""
        from vllm_patch.cli.synthetic import write_checkpoint

        directory = work / (f"widened-for-tp-{tp}" if tp else "checkpoint")
        if not directory.exists():
            wide = self.config.widened(tp) if tp else self.config
            sizes = ", ".join(f"{name} {size}" for name, size in wide.mlp_sizes.items())
            say(f"writing a synthetic checkpoint: {sizes}")
            directory.mkdir()
            write_checkpoint(self.config, directory, wide)
        return directory

    def _verdict(self, tp: int, widened: bool = False) -> Verdict:
        if widened:
            return self._derived(self.config.widened(tp), tp)
        return self._as_it_is.at(tp=tp)

    def _derived(self, config: ModelConfig, tp: int) -> Verdict:
        return check.verdict(Checkpoint(str(config.path), config.fields, None), tp)

    def _serves_stock(self, tp: int) -> bool:
        """Whether stock serves the model at ``tp``, in whichever form."""
        here, wide = self._verdict(tp), self._verdict(tp, widened=True)
        if wide.undivided:
            return False
        if _is_whole(here):
            return True
        if self.args.model is None:
            return _is_whole(wide)
        changed = {r.layer.kind for r in here.rows if r.ours.kind != "stock"}
        is_alone = changed == {"experts"} and _is_whole(self._verdict(1))
        return is_alone and not self.is_on_cpu

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
        as_it_is = [size for size in sizes if _is_whole(self._verdict(size))]
        return max(as_it_is or sizes, default=self.args.baseline_tp)

    def _check_sizes(self) -> None:
        tp, verdict = self.args.tp, self._verdict(self.args.tp)
        if undivided := verdict.undivided_by:
            raise UsageError(f"--tp {tp} does not divide {undivided}.")
        if not verdict.is_cut and verdict.model.unknown:
            raise UsageError(
                f"{self.config.path}: not known: {', '.join(verdict.model.unknown)}, "
                f"so not what --tp {tp} cuts. vllm-patch check says what is known."
            )
        if not verdict.is_cut:
            raise UsageError(
                f"--tp {tp} keeps the quant blocks of {self.config.path} whole: stock "
                "vLLM serves it, and there is nothing to compare."
            )

    def _check_measures(self) -> None:
        for option, size in (
            ("--baseline-tp", self.baseline_tp),
            ("--control-tp", self.control_tp),
        ):
            check.check_size(option, size)
            if undivided := self._verdict(size, widened=True).undivided_by:
                raise UsageError(f"{option} {size} does not divide {undivided}.")
            if not self._serves_stock(size):
                raise UsageError(
                    f"{option} {size} cuts quant blocks of {self.config.path}, so "
                    f"stock vLLM is no measure there; {self._advice()}"
                )
        given = self.args.engine_args
        if self.control_tp == self.baseline_tp and given.items() >= ONE_BY_ONE.items():
            raise UsageError(
                f"the control would be the baseline again: both at TP {size}, prompt "
                "by prompt. Leave max_num_seqs out of --engine-args, or give another "
                "--control-tp."
            )

    def _advice(self) -> str:
        tp, how = self.args.tp, ""
        if able := [str(n) for n in range(1, tp + 1) if self._serves_stock(n)]:
            return f"it is at {', '.join(able)}."
        if self.args.model:
            how = " There may be with --config, which can widen a model by zeros."
        return f"nor at any up to {tp}: there is nothing to judge by.{how}"


def _is_whole(verdict: Verdict) -> bool:
    """Whether ranks share a model out in whole blocks."""
    return not verdict.undivided and not verdict.is_cut


def batches(vocab_size: int) -> list[list[list[int]]]:
    """Return what each run scores, a list of prompts at a time: the same each time."""
    draw = random.Random(0)
    shapes = [TOGETHER] + [(1, tokens) for times, tokens in ALONE for _ in range(times)]
    return [
        [[draw.randrange(3, vocab_size) for _ in range(tokens)] for _ in range(prompts)]
        for prompts, tokens in shapes
    ]
