"""What ``vllm-patch check`` says, against the real engine, from the files alone.

``python -m tests.engine.grid`` loads each cell of a grid of synthetic models and TP
sizes in the installed vLLM for CPUs, stock and patched: most of an hour on two cores.
``python -m tests.engine.grid 1408 "TP 8"`` loads those with such words in their names.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from vllm_patch import releases
from vllm_patch.cli import engine_process
from vllm_patch.cli.check import checkpoint, layers, quantization
from vllm_patch.cli.check.stock import CPU, Setting
from vllm_patch.cli.check.verdict import Verdict
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

MODELS = Path(__file__).parent.parent / "models"
SECONDS = 600


@dataclass(frozen=True)
class Cell:
    """A model at a size.

    Attributes:
        model: A file of ``tests/models``, without its suffix.
        tp: Tensor-parallel size.
        changes: Of its config.json.
        layers: How many are kept.

    """

    model: str
    tp: int
    changes: dict[str, int] = field(default_factory=dict)
    layers: int = 1

    def __str__(self) -> str:
        changes = "".join(f", {name} {size}" for name, size in self.changes.items())
        return f"{self.model}{changes}, TP {self.tp}"


EXPERTS = [{}, {"moe_intermediate_size": 1280}, {"moe_intermediate_size": 1408}]
GRID = [
    *(Cell("qwen3_moe_1536", tp, changes) for changes in EXPERTS for tp in (2, 4, 8)),
    *(Cell("qwen3_2432", tp) for tp in (2, 4, 8)),
    # KV heads on two ranks; shared experts and a dense layer; the same, of which a rank
    # that has all ends inside a block; MLA.
    Cell("qwen3_heads_of_64", 8),
    Cell("glm4_moe_1408", 4, layers=2),
    Cell("glm4_moe_1408", 1, layers=2),
    Cell("deepseek_v2_1408_compressed_tensors", 4, layers=2),
    Cell("qwen3_moe_1280_compressed_tensors", 8),
    Cell("qwen3_moe_1536_quark", 8),
    Cell("qwen3_2432_modelopt", 4),
]


def compare(said: Verdict, work: Path) -> None:
    """Load a model in the engine twice.

    Args:
        said: What ``check`` says of it.
        work: The folder of its checkpoint, and for what the engine says.

    Raises:
        AssertionError: The engine does anything else.

    """
    assert not said.model.unknown and not said.undivided
    refused = {row.stock.text for row in said.rows if not row.stock.runs}
    ranks, log = held(work, said.setting.tp, patched=False)
    if refused:
        errors = {line.partition("Error: ")[2] for line in log.splitlines()}
        assert not ranks and refused & errors, (refused, log[-3000:])
    else:
        assert_same(ranks, allocated(said, "stock"), log)
    ranks, log = held(work, said.setting.tp, patched=True)
    if not all(row.runs for row in said.rows):
        assert not ranks, "check says that the patched engine does not start"
    else:
        assert_same(ranks, allocated(said, "ours"), log)


def assert_same(ranks: list[Counter], said: list[Counter], log: str) -> None:
    """Compare bytes of modules; all are missing where the engine failed."""
    for rank, (real, by_check) in enumerate(
        zip_longest(ranks, said, fillvalue=Counter())
    ):
        names = sorted({*real, *by_check})
        odd = {n: (real[n], by_check[n]) for n in names if real[n] != by_check[n]}
        assert not odd, f"rank {rank}, bytes held and said: {odd}; {log[-3000:]}"


def verdict(cell: Cell, folder: Path) -> Verdict:
    """Write a cell's checkpoint; return what ``check`` says of the folder."""
    config = ModelConfig.read(MODELS / f"{cell.model}.json").with_layers(cell.layers)
    folder.mkdir()
    write_checkpoint(config._with_text(**cell.changes), folder)
    found = checkpoint.read(str(folder))
    how = quantization.read(found.fields, found.name)
    release = releases.installed().partition("+")[0]
    setting = Setting(release, cell.tp, CPU, "auto", how.format, how.block)
    model = layers.layers(found.tensors, how, found.fields)
    return Verdict(model, found.fields, setting)


def allocated(said: Verdict, how: str) -> list[Counter]:
    """Return each rank's bytes by module, with * for numbers."""
    return [
        Counter({row.layer.name: row.bytes(rank, how) for row in said.rows})
        for rank in range(said.setting.tp)
    ]


def held(work: Path, tp: int, patched: bool) -> tuple[list[Counter], str]:
    """Return the same of the engine, empty if it failed, and its log."""
    out = work / f"patched-{patched}"
    command = [sys.executable, "-m", "tests.engine.held", str(work / "checkpoint")]
    done = subprocess.run(
        [*command, str(tp), str(out)],
        env=engine_process.environment(patched),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        return [], log
    ranks = []
    for rank in range(tp):
        ranks.append(Counter())
        for name, size in json.loads(Path(f"{out}.{rank}").read_text()).items():
            # vLLM keeps experts' weights one level deeper.
            name = name.removesuffix(".routed_experts")
            ranks[rank][re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += size
    return ranks, log


def main(*words: str) -> int:
    """Compare cells; return 1 if the engine does anything else with one."""
    failed = 0
    for cell in (cell for cell in GRID if all(word in str(cell) for word in words)):
        with tempfile.TemporaryDirectory() as work:
            said = verdict(cell, Path(work) / "checkpoint")
            texts = {row.stock.text for row in said.rows if row.stock.kind == "unknown"}
            if texts:
                print(f"{cell}: left out: {', '.join(texts)}", flush=True)
                continue
            try:
                compare(said, Path(work))
                kinds = {f"{row.stock.kind} -> {row.ours.kind}" for row in said.rows}
                print(f"{cell}: as check says: {', '.join(sorted(kinds))}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{cell}: NOT as check says: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
