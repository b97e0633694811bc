# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch parity``: does the patched engine answer as stock vLLM does?"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_patch import __version__, plugin, releases
from vllm_patch.cli import UsageError, engine_process, remove
from vllm_patch.cli.check import checkpoint
from vllm_patch.cli.check import command as check
from vllm_patch.cli.engine_process import EngineProcess, EngineResult, say
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.parity_runs import Runs, batches
from vllm_patch.cli.parity_verdict import Verdict

DESCRIPTION = """\
Run the real vLLM engine four times, each in a process of its own: stock at the
baseline TP, stock at a control TP (how far two stock runs are apart), stock at
TP N (expected to fail if N cuts a quant block), and patched at TP N. Parity holds
if patched is no farther from the baseline than the control is, with the slack
printed in the last lines. Exit code: 0 parity, 1 no parity, 2 wrong usage, or runs
that cannot be judged."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "parity",
        help="compare the patched engine with stock",
        description=DESCRIPTION,
        epilog="example: vllm-patch parity --config config.json --layers 2 --tp 8",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a Hugging Face config.json; a synthetic checkpoint is written for it",
    )
    source.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint folder")
    parser.add_argument(
        *check.TP, type=int, required=True, metavar="N", help="size to patch"
    )
    parser.add_argument(
        "--baseline-tp", type=int, default=1, metavar="N", help="default 1"
    )
    parser.add_argument(
        "--control-tp",
        type=int,
        help="default: the largest below --tp that cuts no quant block; else the "
        "largest up to --tp at which stock serves the same model in another form "
        "(--config: widened by zeros, --model: expert parallelism, on GPUs); else the "
        "baseline's, with its prompts one by one",
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
        "--logs", type=Path, metavar="DIR", help="keep each run's full output there"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds for each run (1800)"
    )
    parser.set_defaults(run=run)


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a JSON object such as '{{\"max_model_len\": 512}}'"
    )


def run(args: argparse.Namespace) -> int:
    """Run the comparison that ``args`` asks for; return the exit code."""
    _check(args)
    config_file = args.config or args.model / "config.json"
    config = ModelConfig.read(config_file)
    if args.model and "load_format" not in args.engine_args:
        _check_weights(args.model)
    if args.layers:
        config = config.with_layers(args.layers)
    runs = Runs(args, config, _on_cpu())
    with _result_file(args.json):
        verdict = _judge(runs, config, args)
        print(verdict.table())
        if args.json:
            report = {
                "vllm_patch": __version__,
                "config": str(config_file),
                "tp": args.tp,
                "layers": args.layers,
                **verdict.report(),
            }
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    return verdict.code


def _judge(runs: Runs, config: ModelConfig, args: argparse.Namespace) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="vllm-patch-parity-") as temporary:
        work = Path(temporary)
        logs = args.logs or work
        logs.mkdir(parents=True, exist_ok=True)
        processes = runs.processes(work)
        return Verdict(_run_all(processes, config, logs, args.timeout))


@contextlib.contextmanager
def _result_file(file: Path | None) -> Iterator[None]:
    """Try to write before an hour of runs; leave no file that is not this result."""
    try:
        if file:
            file.write_text("")
        yield
    except BaseException:
        # Not what a shell opened, such as /dev/stdout.
        if file and file.is_file() and not file.is_symlink():
            remove([file], set())
        raise


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


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
    if problem := plugin.unsupported(releases.installed()):
        raise UsageError(problem)


def _check_weights(folder: Path) -> None:
    """Refuse files that no run could load, half a minute before the first one does."""
    found = checkpoint.read(str(folder))
    if not found.tensors and not any(folder.glob("*.bin")):
        raise UsageError(
            f"--model {folder} holds no weights (*.safetensors). Give the folder of a "
            "whole checkpoint, or --config."
        )


def _run_all(
    processes: dict[str, EngineProcess], config: ModelConfig, logs: Path, timeout: float
) -> dict[str, tuple[EngineProcess, EngineResult]]:
    scored, results = batches(config.vocab_size), {}
    for number, (role, process) in enumerate(processes.items(), start=1):
        say(f"[{number}/{len(processes)}] {process.label}")
        result = engine_process.run(process, scored, logs, timeout)
        say(f"      {result.seconds:.0f} s: {result.error or 'done'}")
        results[role] = process, result
        if result.error and role in ("baseline", "control"):
            break  # Nothing could be judged by it.
    return results
