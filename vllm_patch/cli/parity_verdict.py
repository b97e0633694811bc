# SPDX-License-Identifier: Apache-2.0
"""What the four runs of ``parity`` amount to, for people and for machines."""

from dataclasses import asdict
from typing import Any

from vllm_patch.cli import comparison
from vllm_patch.cli.engine_process import EngineProcess, EngineResult

HOLDS, FAILS, UNJUDGED = 0, 1, 2
GIB = 2**30
_HEAD = ("run", "result", "mean |dlogp|", "max |dlogp|", "top-1", "seconds", "GiB")


class Verdict:
    """The results by role, compared; later runs are missing if a measure failed."""

    def __init__(self, results: dict[str, tuple[EngineProcess, EngineResult]]):
        self.results = results
        baseline = results["baseline"][1]
        self.differences = {
            role: comparison.difference(baseline.scores, result.scores)
            for role, (_, result) in results.items()
            if role != "baseline" and baseline.scores and result.scores
        }

    @property
    def unjudged(self) -> str | None:
        """Why the patched engine cannot be judged by these runs, or None."""
        for role, (process, result) in self.results.items():
            counts = role in ("baseline", "control") or result.ended_outside
            if result.error and counts and role != "stock":
                return f"{process.label} failed: {result.error}"
        control, patched = self.differences["control"], self.differences.get("patched")
        if not control.is_noise:
            process, result = self.results["patched"]
            said = (
                f"the control is {control.mean:.2f} nats from the baseline, too far to "
            )
            # Which may be what makes stock's answers nonsense: a damaged checkpoint.
            if result.error:
                return f"{said}judge by, and {process.label} failed: {result.error}"
            return f"{said}judge by; try fewer --layers or another --control-tp"
        served = [result for _, result in self.results.values() if result.scores]
        operators = {" and ".join(result.operators) for result in served}
        if len(operators) > 1:
            return f"the runs differ in more than TP: {' / '.join(operators)}"
        if patched and self.results["patched"][1].padding is None:
            return (
                "the plugin took no layer over: this TP size cuts no quant block, or "
                "the run's log (--logs) says why"
            )
        misses_noise = self._is_same_tp or not control.max
        if patched and self.failure and misses_noise and patched.is_noise:
            return (
                "patched is farther from the baseline than the control, but the "
                "control has the same TP or is exactly 0, and another TP adds noise "
                "that it does not have; give --config and no --model, or --control-tp"
            )
        return None

    @property
    def _is_same_tp(self) -> bool:
        baseline, control = (
            self.results[role][0].engine["tensor_parallel_size"]
            for role in ("baseline", "control")
        )
        return baseline == control

    @property
    def limits(self) -> tuple[float, float]:
        """How far patched may be from the baseline: mean and max, nats."""
        return comparison.limits(self.differences["control"], self._is_same_tp)

    @property
    def failure(self) -> str | None:
        """Why there is no parity, or None; only where the runs can be judged."""
        process, result = self.results["patched"]
        if result.error:
            return f"{process.label} failed: {result.error}"
        if not self.differences["patched"].within(self.limits):
            return "patched is farther from the baseline than noise explains"
        return None

    @property
    def code(self) -> int:
        """The command's exit code."""
        if self.unjudged:
            return UNJUDGED
        return FAILS if self.failure else HOLDS

    def __str__(self) -> str:
        if self.unjudged:
            return f"CANNOT BE JUDGED: {self.unjudged}"
        return f"NO PARITY: {self.failure}" if self.failure else "PARITY HOLDS"

    def table(self) -> str:
        """Return a row for each run, then what was logged and allowed."""
        width = max(len(process.label) for process, _ in self.results.values()) + 2
        lines = [_row(width, *_HEAD)]
        for role, (process, result) in self.results.items():
            outcome = "fails" if result.error else "serves"
            gap = self.differences.get(role)
            gaps = ["-"] * 3
            if gap:
                gaps = [f"{gap.mean:.4f}", f"{gap.max:.4f}", f"{gap.top1:.1%}"]
            spent = f"{result.seconds:.0f}", f"{result.peak_bytes / GIB:.1f}"
            lines.append(_row(width, process.label, outcome, *gaps, *spent))
        lines.append("")
        for process, result in self.results.values():
            if result.error and process.label not in str(self):
                lines.append(f"{process.label}: {result.error}")
            lines += filter(None, [result.padding])
        lines += self.results["baseline"][1].operators
        if control := self.differences.get("control"):
            mean, most = self.limits
            none = "" if control.max else " (the control is exactly 0: it saw no noise)"
            lines.append(
                f"limits over {control.positions} positions, nats: mean {mean:.4f}, "
                f"max {most:.4f}{none}"
            )
        return "\n".join([*lines, str(self)])

    def report(self) -> dict[str, Any]:
        """Return the result for machines."""
        gaps = {role: asdict(gap) for role, gap in self.differences.items()}
        runs = {
            role: {**asdict(process), **asdict(result), "difference": gaps.get(role)}
            for role, (process, result) in self.results.items()
        }
        return {
            "parity": None if self.unjudged else not self.failure,
            "failure": self.unjudged or self.failure,
            "runs": runs,
        }


def _row(width: int, label: str, outcome: str, *cells: str) -> str:
    return "{:<{}}{:<8}{:>14}{:>14}{:>10}{:>10}{:>8}".format(
        label, width, outcome, *cells
    )
