"""That ``vllm-patch check`` says what the real engine does, from the files alone."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from vllm_patch.cli import engine_process
from vllm_patch.cli.check import checkpoint, layers, quantization
from vllm_patch.cli.check.stock import Setting
from vllm_patch.cli.check.verdict import Verdict
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

MODELS = Path(__file__).parent.parent / "models"
TP, SECONDS = 2, 600
RELEASE = "0.32.0"


def held(folder: Path, out: Path, patched: bool) -> tuple[list[dict], str]:
    """Load the model in the engine; return each rank's bytes by module, and the log."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.held", str(folder), str(TP), str(out)],
        env=engine_process.environment(patched),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    files = [Path(f"{out}.{rank}") for rank in range(TP)]
    loaded = done.returncode == 0
    ranks = [json.loads(file.read_text()) for file in files] if loaded else []
    return ranks, done.stdout + done.stderr


def test_the_engine_does_what_check_says(tmp_path):
    """A dense MLP of 19 blocks, so 1216 on a rank, and experts of 384 / 2 = 192."""
    config = ModelConfig.read(MODELS / "qwen3_moe_1536.json")
    sizes = {"intermediate_size": 2432, "moe_intermediate_size": 384}
    config = config._with_text(mlp_only_layers=[0], **sizes)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_checkpoint(config, folder)
    found = checkpoint.read(str(folder))
    how = quantization.read(found.fields, found.name)
    text = found.fields
    setting = Setting(RELEASE, TP, "cpu", "auto", how.format, how.block)
    said = Verdict(layers.layers(found.tensors, how, text), text, setting)
    assert said.code == 1 and not said.model.unknown
    (error,) = {row.stock.text for row in said.rows if not row.stock.runs} & {
        line.partition("Error: ")[2]
        for line in held(folder, tmp_path / "stock", patched=False)[1].splitlines()
    }
    ranks, log = held(folder, tmp_path / "patched", patched=True)
    assert len(ranks) == TP, log[-3000:]
    for rank, modules in enumerate(ranks):
        by_rows = {row.layer.name: row.bytes(rank, "ours") for row in said.rows}
        held_by_kind = Counter()
        for name, size in modules.items():
            held_by_kind[kind(name)] += size
        assert held_by_kind == {kind(name): size for name, size in by_rows.items()}


def kind(module: str) -> str:
    """Return its name without its layer; vLLM keeps experts one level deeper."""
    return re.sub(r"layers\.\d+", "layers.*", module).removesuffix(".routed_experts")
