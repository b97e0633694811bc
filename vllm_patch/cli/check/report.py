# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-patch check`` prints.

``--json`` prints one object, whose ``schema`` is 1. Fields may be added to it; none
changes or goes without another number.

    schema, vllm_patch, model   1, this package's version, what was asked about
    vllm, platform, moe_backend what was assumed
    built_in                    whether that vLLM pads in its own source
    format, block               of the checkpoint; block is [rows, columns] or null
    source                      "headers", or "config" if tensors are derived from it
    unknown, notes              layers nobody here can judge; what else was left out
    other_bytes                 of the checkpoint's tensors that are not in FP8 blocks
    code                        the exit code
    left_out                    of --all: size -> why vLLM starts no model at it
    sizes                       one for each --tp:
      tp, code, error           size, its exit code, why vLLM starts no model, or null
      bytes                     of quantized layers, largest rank: real; stock and ours
                                as allocated, null where it does not run
      ways_out                  for people
      layers                    one for each shape:
        name, kind, count       with * for numbers; see layers.Layer
        outputs, inputs, experts   rows of each shard, columns, experts of one layer
        stock                   kind, text: see stock.Answer
        ours                    kind, why: see ours.Ours
        cut                     total, size, shared: block -> ranks that hold columns
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vllm_patch import __version__
from vllm_patch.cli.check.layers import Dimension, Layers
from vllm_patch.cli.check.quantization import Quantization
from vllm_patch.cli.check.stock import Setting
from vllm_patch.cli.check.verdict import (
    AS_IT_IS,
    CANNOT_RUN,
    NEEDS_US,
    ONE_MACHINE,
    Row,
    Verdict,
    chosen,
    gb,
    shared_blocks,
)

SCHEMA = 1
SAYS = {
    AS_IT_IS: "runs in stock vLLM",
    NEEDS_US: "needs this package",
    CANNOT_RUN: "cannot run",
}
KERNELS = {
    "compact": "the masked Triton kernels of this package",
    "padded": "vLLM's kernels for whole blocks",
    "refined": "vLLM's Triton kernels, slower on small blocks",
    "shared": "the chosen backend's",
}


def text(
    name: str, source: str, quantization: Quantization, verdicts: list[Verdict]
) -> str:
    """Return the report on one or several sizes for people."""
    lines = _heading(name, source, quantization, verdicts[0].model)
    for verdict in verdicts:
        lines += ["", *_size(verdict)]
    return "\n".join(lines)


def _heading(
    name: str, source: str, quantization: Quantization, model: Layers
) -> list[str]:
    block = quantization.block
    shown = f"FP8 in blocks of {block[0]} x {block[1]} ({quantization.format})"
    return [
        f"{name}: {shown}, by {source}",
        *(f"  not known: {each}" for each in model.unknown),
        *(f"  {note}" for note in model.notes),
    ]


def _where(setting: Setting) -> str:
    return f"vLLM {setting.release}, {setting.platform}"


def _size(verdict: Verdict) -> list[str]:
    setting = verdict.setting
    lines = [f"TP {setting.tp} ({_where(setting)}): {_says(verdict)}"]
    ways = [f"  or: {way}" for way in verdict.ways_out()]
    if verdict.undivided:
        return [*lines, f"  {verdict.undivided}", *ways]
    whole = [r for r in verdict.rows if r.ours.kind == "stock" and r.stock.runs]
    if whole:
        names = ", ".join(f"{row.count} x {row.layer.name}" for row in whole)
        lines.append(f"  in whole blocks: {names}")
    for row in (row for row in verdict.rows if row not in whole):
        lines += [f"  {line}" for line in _row(row)]
    lines += [f"  {line}" for line in _bytes(verdict)]
    return [*lines, *ways]


def _says(verdict: Verdict) -> str:
    if verdict.code == CANNOT_RUN and verdict.model.unknown and not verdict.undivided:
        return "cannot be told, for what is not known"
    kinds = {row.stock.kind for row in verdict.rows}
    is_taken = any(row.is_taken for row in verdict.rows)
    if verdict.code == AS_IT_IS and verdict.setting.is_built_in and is_taken:
        return "runs in this vLLM, which has the padding built in"
    if verdict.code == AS_IT_IS and "refined" in kinds:
        is_compact = any(row.ours.kind == "compact" for row in verdict.rows)
        gain = ", faster with this package" if is_compact else ""
        return f"{SAYS[AS_IT_IS]} on refined blocks{gain}"
    if verdict.code == AS_IT_IS and "shared" in kinds:
        return f"{SAYS[AS_IT_IS]} with idle ranks"
    return SAYS[verdict.code]


def _row(row: Row) -> list[str]:
    layer = row.layer
    what = f"{layer.experts} experts of " if layer.kind == "experts" else ""
    shape = " + ".join(map(str, layer.outputs))
    cut = ", ".join(_cut(dimension, row.block) for dimension in row.cut)
    label = "cut" if any(each.parts > 1 for each in row.cut) else "ends inside a block"
    shown = f"{row.count} x {layer.name}, {what}{shape} x {layer.inputs}"
    why = f" ({row.ours.why})" if row.ours.why else ""
    kernels = KERNELS.get(row.ours.kind if row.is_taken else row.stock.kind, "none")
    return [
        f"{label}: {shown}: {cut}" if cut else shown,
        *(f"    {line}" for line in _straddles(row)),
        f"    stock:        {row.stock.text or 'loads it'}",
        f"    this package: {row.ours.kind}{why}",
        f"    kernels:      {kernels}",
    ]


def _cut(dimension: Dimension, block: int) -> str:
    total, parts, size = dimension.total, dimension.parts, dimension.size
    return f"{total} / {parts} = {size}" if parts > 1 else f"{total / block:g} blocks"


def _straddles(row: Row) -> list[str]:
    lines = []
    for dimension in row.cut:
        shared = [*shared_blocks(dimension, row.block).items()]
        parts = [f"{number}: {'+'.join(map(str, on))}" for number, on in shared[:8]]
        rest = f", and {len(shared) - 8} more" if len(shared) > 8 else ""
        if shared:
            lines.append(f"block on ranks: {', '.join(parts)}{rest}")
    return lines


def _bytes(verdict: Verdict) -> list[str]:
    sizes = {
        "real": verdict.largest("real"),
        "stock allocates": verdict.largest("stock"),
        "this package": verdict.largest("ours"),
    }
    known = [f"{how} {gb(size)}" for how, size in sizes.items() if size]
    lines = []
    if known:
        lines.append(f"FP8 weights and scales, largest rank: {', '.join(known)}")
    if other := verdict.model.other_bytes:
        lines.append(
            f"other tensors of the checkpoint, all ranks together: {gb(other)}"
        )
    return lines


def table(
    name: str,
    source: str,
    quantization: Quantization,
    verdicts: list[Verdict],
    left_out: list[Verdict],
) -> str:
    """Return a line for each size that divides the model; one to choose is marked.

    Args:
        name: What the user called the model.
        source: Of its tensors: ``headers`` or ``config``.
        quantization: Of the model.
        verdicts: Of the sizes that do.
        left_out: Of those that do not, which get one line together.

    """
    best, where = chosen(verdicts), _where(verdicts[0].setting)
    lines = [
        *_heading(name, source, quantization, verdicts[0].model),
        "",
        f"  {'TP':>3}  {'real':>9}  {'stock':>9}  {'ours':>9}  {where}",
    ]
    for verdict in verdicts:
        real, stock, held = (verdict.largest(how) for how in ("real", "stock", "ours"))
        cells = "  ".join(f"{gb(size):>9}" for size in (real, stock, held))
        mark = ">" if verdict is best else " "
        lines.append(f"{mark} {verdict.setting.tp:>3}  {cells}  {_says(verdict)}")
    lines.append(
        "FP8 weights and scales of the largest rank, as allocated. > is the largest "
        f"size up to {ONE_MACHINE} with hardly any padding."
    )
    reasons = defaultdict(list)
    for verdict in left_out:
        reasons[verdict.undivided_by].append(verdict.setting.tp)
    parts = [f"{_ranges(sizes)} ({what})" for what, sizes in reasons.items()]
    if parts:
        lines.append(f"Left out, as they do not divide the model: {'; '.join(parts)}.")
    return "\n".join(lines)


def _ranges(sizes: list[int]) -> str:
    """Return ascending numbers for people: ``3, 5-7``."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and size == runs[-1][-1] + 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def as_json(
    name: str,
    source: str,
    quantization: Quantization,
    verdicts: list[Verdict],
    code: int,
    left_out: Sequence[Verdict] = (),
) -> dict[str, Any]:
    """Return the report for machines; the module says what it holds."""
    setting, model = verdicts[0].setting, verdicts[0].model
    return {
        "schema": SCHEMA,
        "vllm_patch": __version__,
        "model": name,
        "vllm": setting.release,
        "platform": setting.platform,
        "moe_backend": setting.backend,
        "built_in": setting.is_built_in,
        "format": quantization.format,
        "block": quantization.block,
        "source": source,
        "unknown": [*model.unknown],
        "notes": model.notes,
        "other_bytes": model.other_bytes,
        "code": code,
        "sizes": [_size_json(verdict) for verdict in verdicts],
        "left_out": {each.setting.tp: each.undivided for each in left_out},
    }


def without_blocks(
    name: str, quantization: Quantization, code: int, note: str
) -> dict[str, Any]:
    """Return the report on a model without FP8 blocks, which has no sizes."""
    return {
        "schema": SCHEMA,
        "vllm_patch": __version__,
        "model": name,
        "format": quantization.format,
        "block": None,
        "notes": [note],
        "code": code,
        "sizes": [],
    }


def _size_json(verdict: Verdict) -> dict[str, Any]:
    hows = "real", "stock", "ours"
    return {
        "tp": verdict.setting.tp,
        "code": verdict.code,
        "error": verdict.undivided,
        "bytes": {how: verdict.largest(how) for how in hows},
        "ways_out": verdict.ways_out(),
        "layers": [_row_json(row) for row in verdict.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    layer = row.layer
    return {
        "name": layer.name,
        "kind": layer.kind,
        "count": row.count,
        "outputs": layer.outputs,
        "inputs": layer.inputs,
        "experts": layer.experts,
        "stock": {"kind": row.stock.kind, "text": row.stock.text},
        "ours": {"kind": row.ours.kind, "why": row.ours.why},
        "cut": [
            {
                "total": each.total,
                "size": each.size,
                "shared": shared_blocks(each, row.block),
            }
            for each in row.cut
        ],
    }
