"""What ``benchmarks.engine`` compares before it measures: logits, or all by parity."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks import engine_child
from benchmarks.engine_child import ENVIRONMENT, OutOfTime, RowFailed
from benchmarks.engine_models import Model
from benchmarks.engine_rows import row_of
from benchmarks.engine_ways import WAYS, spec_of
from benchmarks.run import Rows
from vllm_patch.cli.main import main as vllm_patch
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

TOLERATED = 2**-5
CHECKED = {"num_hidden_layers": 2, "vocab_size": 8192}
# As many layers as a few minutes allow, which are for four engines.
PARITY_LAYERS = 32
PARITY_SECONDS = 300
PARITY = {"hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 8192}


def check(model: Model, args: argparse.Namespace, rows: Rows) -> list[str]:
    """Compare the rank's logits; return what is wrong with them."""
    with tempfile.TemporaryDirectory() as folder:
        _write_small(model, Path(folder))
        found = {way: _logits(model, way, folder, args) for way in ("this", "padded")}
        found["refined"] = _logits(model, "refined", folder, args)
    for way in ("this", "padded"):
        if isinstance(found[way], str):
            return [f"{model.name}, check, {way}: {found[way]}"]
    error = _difference(found["this"], found["padded"])
    stock_refuses = isinstance(found["refined"], str)
    control = (
        TOLERATED if stock_refuses else _difference(found["refined"], found["padded"])
    )
    print(f"{model.name}: logits differ by {error:.2e}, may by {control:.2e}")
    if error > control:
        return [f"{model.name}: logits differ by {error:.2e} of at most {control:.2e}"]
    row = {"value": error, "p90": control, "unit": "relative"}
    rows.add(row_of(model, "check", "this", args, {"measure": "logits", **row}))
    return []


def parity(model: Model, args: argparse.Namespace, rows: Rows) -> list[str]:
    """Compare all ranks with stock's; return what is wrong with them.

    Raises:
        OutOfTime: The deadline is over.

    """
    left = args.deadline - time.monotonic()
    if left <= 0:
        raise OutOfTime
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, ENVIRONMENT),
    ):
        config, out = Path(folder) / "config.json", Path(folder) / "parity.json"
        layers = min(PARITY_LAYERS, model.sizes["num_hidden_layers"])
        config.write_text(json.dumps(model.config(layers, **PARITY, **_few(model))))
        command = ["parity", "--config", config, "--json", out, "--tp", args.gpus]
        command += ["--timeout", min(PARITY_SECONDS, left / 4)]
        vllm_patch([str(text) for text in command])
        found = json.loads(out.read_text()) if out.is_file() else {}
    if not found.get("parity"):
        return [f"{model.name}, parity: {found.get('failure', 'not run')}"]
    gaps = {role: run["difference"] for role, run in found["runs"].items()}
    row = {"value": gaps["patched"]["mean"], "p90": gaps["control"]["mean"]}
    rows.add(row_of(model, "check", "this", args, {"measure": "parity", **row}))
    return []


def _write_small(model: Model, folder: Path) -> None:
    """Write a checkpoint of the same layers, but few of them and few experts."""
    layers = CHECKED["num_hidden_layers"]
    fields = model.config(layers, **CHECKED, **_few(model))
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    write_checkpoint(ModelConfig.read(path), folder)


def _few(model: Model) -> dict[str, int]:
    """Return the fields of few experts."""
    names = "num_experts", "n_routed_experts"
    return {name: 16 for name in names if name in model.config()}


def _logits(
    model: Model, way: str, folder: str, args: argparse.Namespace
) -> "torch.Tensor | str":
    """Return a rank's logits, or why there are none."""
    out = f"{folder}/{way}.pt"
    spec = spec_of(model, "eager", way, args, logits=out)
    spec["engine"].update(model=folder, gpu_memory_utilization=0.3)
    print(f"{model.name}: logits of {way} ...", flush=True)
    try:
        engine_child.process(spec, WAYS[way].environment, deadline=args.deadline)
    except RowFailed as error:
        return str(error)
    return torch.load(out)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest relative difference of a prompt's logits."""
    return ((one - other).norm(dim=-1) / other.norm(dim=-1)).max().item()
