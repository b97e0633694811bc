# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch parity``: does the patched engine answer as stock vLLM does?"""

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_patch import __version__, plugin
from vllm_patch.cli import comparison, engine_process
from vllm_patch.cli.engine_process import EngineProcess, EngineResult
from vllm_patch.cli.errors import UsageError
from vllm_patch.cli.model_config import ModelConfig

PROMPTS, PROMPT_TOKENS = 8, 96
DESCRIPTION = """\
Run the real vLLM engine four times, each in a process of its own: stock at the
baseline TP, stock at a control TP (how far two stock runs are apart), stock at
TP N (expected to fail if N cuts a quant block), and patched at TP N. Parity holds
if patched is no farther from the baseline than the control is, with the slack
printed in the last lines. Exit code: 0 parity, 1 no parity, 2 wrong usage."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "parity", help="compare the patched engine with stock", description=DESCRIPTION
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a Hugging Face config.json; a synthetic checkpoint is written for it",
    )
    source.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint folder")
    parser.add_argument("--tp", type=int, required=True, help="size to patch")
    parser.add_argument("--baseline-tp", type=int, default=1, help="default 1")
    parser.add_argument(
        "--control-tp",
        type=int,
        help="default: the largest below --tp that keeps experts in whole quant "
        "blocks, else --tp itself, for experts widened with zeros (--config) or with "
        "expert parallelism (--model)",
    )
    parser.add_argument("--layers", type=int, help="keep only the first N layers")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result")
    parser.add_argument(
        "--engine-args",
        type=_json_object,
        default={},
        metavar="JSON",
        help="more arguments for vllm.LLM, such as '{\"max_model_len\": 512}'",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        metavar="DIR",
        help="keep each run's full output there",
    )
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds for each run (1800)"
    )
    parser.set_defaults(run=run)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object such as '{{\"max_model_len\": 512}}'"
        )
    return value


def run(args: argparse.Namespace) -> int:
    """Run the comparison that ``args`` asks for; return the exit code."""
    _check(args)
    config_file = args.config or args.model / "config.json"
    config = ModelConfig.read(config_file)
    if args.layers:
        config = config.with_layers(args.layers)
    with tempfile.TemporaryDirectory(prefix="vllm-patch-parity-") as temporary:
        work = Path(temporary)
        logs = args.logs or work
        logs.mkdir(parents=True, exist_ok=True)
        processes = _processes(args, config, work)
        verdict = _Verdict(_run_all(processes, config, logs, args.timeout))
    print(verdict.table())
    if args.json:
        report = verdict.report(args, config_file)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if verdict.parity else 1


def _check(args: argparse.Namespace) -> None:
    for name in ("tp", "baseline_tp", "control_tp", "layers", "timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value}: give a positive number.")
    if args.model and args.layers:
        raise UsageError(
            "--layers shrinks a synthetic checkpoint: use it with --config."
        )
    if args.model and not args.model.is_dir():
        raise UsageError(
            f"--model {args.model}: give a local folder with config.json and weights; "
            "parity downloads nothing."
        )
    for name in sorted({"model", "tensor_parallel_size"} & args.engine_args.keys()):
        raise UsageError(
            f"--engine-args sets {name}, which parity chooses for each run: use "
            "--model, --config and --tp."
        )
    if args.json and args.json.is_dir():
        raise UsageError(f"--json {args.json}: give a file, not a folder.")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: its folder does not exist.")
    if args.logs and args.logs.exists() and not args.logs.is_dir():
        raise UsageError(f"--logs {args.logs}: give a folder, not a file.")
    if problem := plugin.unsupported():
        raise UsageError(problem)


def _write(
    config: ModelConfig, directory: Path, expert_size: int | None = None
) -> Path:
    from vllm_patch.cli.synthetic import write_checkpoint

    directory.mkdir()
    write_checkpoint(config, directory, expert_size)
    return directory


def _processes(
    args: argparse.Namespace, config: ModelConfig, work: Path
) -> dict[str, EngineProcess]:
    """Return the four runs by role, in the order they are made."""
    if config.cuts_experts(args.baseline_tp) or config.cuts_linear(args.baseline_tp):
        raise UsageError(_no_measure("--baseline-tp", args.baseline_tp, config))
    # A control may cut experts: they are then widened or kept whole.
    if args.control_tp and config.cuts_linear(args.control_tp):
        raise UsageError(_no_measure("--control-tp", args.control_tp, config))
    if not config.cuts_experts(args.tp) and not config.cuts_linear(args.tp):
        raise UsageError(
            f"--tp {args.tp} keeps the quant blocks of {config.path} whole: stock vLLM "
            "serves it, and there is nothing to compare."
        )
    for option in ("tp", "baseline_tp", "control_tp"):
        size = getattr(args, option)
        if size and (undivided := config.undivided(size)):
            name = option.replace("_", "-")
            raise UsageError(f"--{name} {size} does not divide {undivided}.")
    control_tp = args.control_tp or _control_tp(config, args.tp, args.baseline_tp)
    if control_tp == args.baseline_tp:
        raise UsageError(
            f"--control-tp {control_tp} is the baseline's size, so that it would show "
            "no noise; give another."
        )
    how, more = _keep_experts_whole(args, config, control_tp, work)
    if args.config:
        _say(f"writing a synthetic checkpoint for {args.config}")
    model = args.model or _write(config, work / "checkpoint")
    common: dict[str, Any] = {
        "model": str(model),
        "max_model_len": 2 * PROMPT_TOKENS,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        **args.engine_args,
    }

    def process(label: str, tp: int, patched: bool = False, **more) -> EngineProcess:
        engine = {**common, "tensor_parallel_size": tp, **more}
        return EngineProcess(label, engine, patched)

    return {
        "baseline": process(f"stock TP {args.baseline_tp}", args.baseline_tp),
        "control": process(f"stock TP {control_tp}{how} (control)", control_tp, **more),
        "stock": process(f"stock TP {args.tp}", args.tp),
        "patched": process(f"patched TP {args.tp}", args.tp, patched=True),
    }


def _no_measure(option: str, size: int, config: ModelConfig) -> str:
    return (
        f"{option} {size} cuts quant blocks of {config.path}, so stock vLLM is no "
        "measure there; give a size that keeps them whole."
    )


def _control_tp(config: ModelConfig, tp: int, baseline_tp: int) -> int:
    heads = config.text.get("num_attention_heads", 1)
    whole = [
        size
        for size in range(2, tp)
        if size != baseline_tp
        and heads % size == 0
        and not config.cuts_experts(size)
        and not config.cuts_linear(size)
    ]
    return max(whole, default=tp)


def _keep_experts_whole(
    args: argparse.Namespace, config: ModelConfig, tp: int, work: Path
) -> tuple[str, dict[str, Any]]:
    """Return a label and engine arguments with which stock serves at ``tp``."""
    if not config.cuts_experts(tp):
        return "", {}
    # Shared experts of some models take their size from the same field.
    if args.config and not config.text.get("n_shared_experts"):
        unit = tp * config.block
        size = -(-config.expert_size // unit) * unit
        _say(f"writing a checkpoint with experts widened to {size} by zeros (control)")
        return f", experts of {size}", {
            "model": str(_write(config, work / "widened", size))
        }
    if _on_cpu():
        raise UsageError(
            f"--control-tp {tp} cuts the quant blocks of experts of "
            f"{config.expert_size} columns, and vLLM has no expert parallelism on a "
            "CPU to keep them whole; give a size that divides them into whole blocks."
        )
    return " + expert parallel", {"enable_expert_parallel": True}


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _prompts(vocab_size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [
        [draw.randrange(3, vocab_size) for _ in range(PROMPT_TOKENS)]
        for _ in range(PROMPTS)
    ]


def _run_all(
    processes: dict[str, EngineProcess],
    config: ModelConfig,
    logs: Path,
    timeout: float,
) -> dict[str, tuple[EngineProcess, EngineResult]]:
    prompts = _prompts(config.vocab_size)
    results = {}
    for number, (role, process) in enumerate(processes.items(), start=1):
        _say(f"[{number}/{len(processes)}] {process.label}")
        result = engine_process.run(process, prompts, logs, timeout)
        _say(f"      {result.seconds:.0f} s: {result.error or 'done'}")
        results[role] = process, result
        if result.error and role in ("baseline", "control"):
            break  # Nothing could be judged by it.
    return results


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Verdict:
    """The results, compared; the later runs are missing if a measure failed."""

    def __init__(self, results: dict[str, tuple[EngineProcess, EngineResult]]):
        self.results = results
        self.differences = {
            role: comparison.difference(baseline.scores, result.scores)
            for _, baseline in [results["baseline"]]
            for role, (_, result) in results.items()
            if role != "baseline" and baseline.scores and result.scores
        }

    @property
    def failure(self) -> str | None:
        """Why there is no parity, or None."""
        for role in ("baseline", "control", "patched"):
            process, result = self.results[role]
            if result.error:
                return f"{process.label} failed: {result.error}"
        if self.results["patched"][1].padding is None:
            return (
                "the plugin padded nothing: this TP size cuts no quant block, or the "
                "run's log (--logs) says why"
            )
        control, patched = self.differences["control"], self.differences["patched"]
        if not comparison.is_noise(control):
            return (
                f"the control is {control.mean:.2f} nats from the baseline, too far to "
                "judge by; try fewer --layers or another --control-tp"
            )
        if not comparison.holds(patched, control):
            return "patched is farther from the baseline than noise explains"
        return None

    @property
    def parity(self) -> bool:
        return self.failure is None

    def table(self) -> str:
        width = max(len(process.label) for process, _ in self.results.values()) + 2
        head = ("run", "result", "mean |dlogp|", "max |dlogp|", "top-1", "seconds")
        lines = [_row(width, *head)]
        for role, (process, result) in self.results.items():
            outcome = "fails" if result.error else "serves"
            gap = self.differences.get(role)
            gaps = (
                (f"{gap.mean:.4f}", f"{gap.max:.4f}", f"{gap.top1:.1%}")
                if gap
                else ("-", "-", "-")
            )
            lines.append(
                _row(width, process.label, outcome, *gaps, f"{result.seconds:.0f}")
            )
        lines.append("")
        if "patched" in self.results:  # The last one, so all were made.
            stock_process, stock = self.results["stock"]
            if stock.error:
                lines.append(f"{stock_process.label}: {stock.error}")
            if padding := self.results["patched"][1].padding:
                lines.append(padding)
        if "control" in self.differences:
            mean, most = comparison.limits(self.differences["control"])
            lines.append(f"limits, nats: mean {mean:.4f}, max {most:.4f}")
        lines.append(f"NO PARITY: {self.failure}" if self.failure else "PARITY HOLDS")
        return "\n".join(lines)

    def report(self, args: argparse.Namespace, config_file: Path) -> dict[str, Any]:
        """Return the result for machines."""
        runs = {}
        for role, (process, result) in self.results.items():
            gap = self.differences.get(role)
            runs[role] = {
                "label": process.label,
                "engine": process.engine,
                "error": result.error,
                "padding": result.padding,
                "seconds": result.seconds,
                "difference": dataclasses.asdict(gap) if gap else None,
                **(result.scores or {}),
            }
        return {
            "vllm_patch": __version__,
            "config": str(config_file),
            "tp": args.tp,
            "layers": args.layers,
            "parity": self.parity,
            "failure": self.failure,
            "runs": runs,
        }


def _row(width: int, label: str, outcome: str, *cells: str) -> str:
    return f"{label:<{width}}{outcome:<8}" + "".join(f"{cell:>14}" for cell in cells)
