"""Known models' sizes, and what ``check`` says of them, for the README.

``make tables`` writes the table and the picture.

The sizes in known_models.json are those of their published config.json files. An
asterisk marks models that are not published in FP8 blocks: the row is what such a
checkpoint would do.
"""

import json
import sys
from pathlib import Path

from vllm_patch import releases
from vllm_patch.cli.check import derived, layers, plot, quantization
from vllm_patch.cli.check.stock import Setting
from vllm_patch.cli.check.verdict import Verdict

HERE = Path(__file__).parent
MODELS = json.loads((HERE / "known_models.json").read_text())
TABLE = HERE / "known_models.md"
QUANTIZATION = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
SIZES = 2, 4, 8, 16, 32


def config(name: str) -> dict:
    return {**MODELS[name], "quantization_config": QUANTIZATION}


def verdict(name: str, tp: int, release: str = releases.SUPPORTED[-1]) -> Verdict:
    fields = config(name)
    how = quantization.read(fields, name)
    implied = derived.tensors(fields, how)
    model = layers.layers(implied.tensors, how, fields)
    model.unknown.update(implied.unknown)
    setting = Setting(release, tp, "hopper", "auto", how.format, how.block)
    return Verdict(model, fields, setting)


def cell(found: Verdict) -> str:
    """Return the worst of stock's answers, and all of ours."""
    assert not found.model.unknown, found.model.unknown
    if found.undivided:
        return "–"
    kinds = {row.stock.kind for row in found.rows}
    stock = next(k for k in ("error", "wrong", "refined", "fine") if k in kinds)
    # In the order of how they are best.
    ours = [
        kind
        for kind in ("compact", "padded", "left")
        if any(row.ours.kind == kind for row in found.rows)
    ]
    return f"{stock} → {' + '.join(ours)}" if ours else stock


def table() -> str:
    heads = " | ".join(f"TP {tp}" for tp in SIZES)
    lines = [f"| model | experts | {heads} |", f"|---|---:|{'---|' * len(SIZES)}"]
    for name, fields in MODELS.items():
        # MiniMax uses the dense model's name.
        size = fields.get("moe_intermediate_size") or fields["intermediate_size"]
        cells = " | ".join(cell(verdict(name, tp)) for tp in SIZES)
        lines.append(f"| {name} | {size} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    table_file, picture = map(Path, sys.argv[1:])
    table_file.write_text(table())
    plot.write([verdict("Qwen3-235B-A22B", 8)], picture)
