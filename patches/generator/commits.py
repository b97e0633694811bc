# SPDX-License-Identifier: Apache-2.0
"""The series: which file goes upstream in which commit, and why."""

from dataclasses import dataclass

from vllm_patch.releases import SUPPORTED

# Releases that have a series; 0.27.0 was replaced by 0.27.1 within days.
RELEASES = tuple(release for release in SUPPORTED if release != "0.27.0")

LIBRARY = "vllm/model_executor/layers/quantization/fp8_tp_padding"
# A folder that jobs of vLLM's CI collect in each release.
TESTS = "tests/kernels/quantization/fp8_tp_padding"

# Folder here -> folder in a vLLM tree. Files are copied byte for byte.
FOLDERS = {"vllm_patch/fp8_tp_padding": LIBRARY, "tests/fp8_tp_padding": TESTS}

# Files of these folders that do not go upstream, and why.
KEPT_HERE = {
    "tests/fp8_tp_padding/conftest.py": "runs the tests against the plugin",
    "tests/fp8_tp_padding/test_moe_engagement.py": "compares with an unpatched vLLM",
    "tests/fp8_tp_padding/test_linear_engagement.py": "compares with an unpatched vLLM",
    "tests/fp8_tp_padding/test_expert_store.py": "reads the plugin's log",
}

AUTHOR = "Seed e63180b5 maintainers"
EMAIL = "maintainers@users.noreply.b-seed-e63180b5.example"


@dataclass(frozen=True)
class Commit:
    """One patch of the series.

    Attributes:
        name: Names the commit's hooks: ``hooks/*/NAME.diff``.
        message: Subject, blank line, body; the sign-off is added.
        sources: Files of ``FOLDERS`` that come with this commit; ``*`` as in a shell.

    """

    name: str
    message: str
    sources: tuple[str, ...]


COMMITS = (
    Commit(
        name="kernels",
        message="""\
[Kernel] Fused-MoE Triton kernels for shards that end inside a quant block

A rank of a block-quantized FP8 MoE layer owns columns that start and end
inside a 128x128 block (Qwen3-235B at TP 8: 192 of them). These kernels touch
the real columns only: loads are masked and bounded to them, and scales are
taken by the column's place on the checkpoint's grid. SiLU * up is part of the
first GEMM, and the FP8 quantization of the intermediate part of either.
fp8_tp_padding/shard.py holds the geometry.

Nothing uses them yet; the next commit does.

Issue: https://github.com/vllm-project/vllm/issues/17569
""",
        sources=(
            "vllm_patch/fp8_tp_padding/__init__.py",
            "vllm_patch/fp8_tp_padding/configs/*.json",
            "vllm_patch/fp8_tp_padding/dependent_launch.py",
            "vllm_patch/fp8_tp_padding/masked_experts.py",
            "vllm_patch/fp8_tp_padding/masked_kernels.py",
            "vllm_patch/fp8_tp_padding/masked_moe.py",
            "vllm_patch/fp8_tp_padding/shard.py",
            "vllm_patch/fp8_tp_padding/tiles.py",
        ),
    ),
    Commit(
        name="moe",
        message="""\
[Quantization] Load block-FP8 experts at any tensor-parallel size

A rank of a block-quantized FP8 MoE layer owns intermediate_size / tp_size
columns. Where that is not a multiple of the 128x128 block, loading fails
(Qwen3-235B at TP 8: 192 columns), or refines all blocks to smaller ones.

Put the rank's slice into a buffer of whole blocks instead, at the offset
inside a block that it has in the checkpoint, between zeros. Each block then
keeps its scale: nothing is requantized, and the kernels see a layer of whole
blocks. fp8_tp_padding/shard.py holds the geometry, moe.py a subclass of
Fp8MoEMethod that uses it.

Layers whose size keeps blocks whole get Fp8MoEMethod as before.
VLLM_FP8_TP_PADDING=off goes back to that for all layers.

Removable when Fp8MoEMethod itself places shards on the block grid.

Issue: https://github.com/vllm-project/vllm/issues/17569
""",
        sources=(
            "vllm_patch/fp8_tp_padding/engagement.py",
            "vllm_patch/fp8_tp_padding/expert_loader.py",
            "vllm_patch/fp8_tp_padding/expert_store.py",
            "vllm_patch/fp8_tp_padding/moe.py",
            "vllm_patch/fp8_tp_padding/tensor_check.py",
            "vllm_patch/fp8_tp_padding/window.py",
        ),
    ),
    Commit(
        name="linear",
        message="""\
[Quantization] Load block-FP8 linear layers at any tensor-parallel size

Shared experts, dense MLPs, QKV and output projections meet the same limit as
routed experts, and expert parallelism does not help them. Merged layers of
small shards are worse off: three shards of 64 rows share two scale rows, and
the last one loaded wins without an error.

Place each logical shard on the checkpoint's block grid. Column-parallel
layers pad each shard's rows and hand out the real columns of the output;
on Hopper, outside torch.compile, up to 16 tokens are multiplied by the
real rows only. Row-parallel layers pad their input while they quantize it.
Layers that are not cut get Fp8LinearMethod as before.

Removable when Fp8LinearMethod itself places shards on the block grid.

Issue: https://github.com/vllm-project/vllm/issues/52997
""",
        sources=(
            "vllm_patch/fp8_tp_padding/columns.py",
            "vllm_patch/fp8_tp_padding/input_quant.py",
            "vllm_patch/fp8_tp_padding/masked_linear.py",
            "vllm_patch/fp8_tp_padding/linear*.py",
        ),
    ),
    Commit(
        name="tests",
        message="""\
[Test] Block-FP8 layers whose shards end inside a quant block

Every rank of sizes and tensor-parallel sizes of released models rebuilds the
dequantized checkpoint exactly, over parameters that were NaN before;
neighbouring blocks differ 10x in scale. Property tests compare with an oracle
that looks at one element at a time. No GPU is needed to load; the tests that
run kernels take Triton's interpreter.
""",
        sources=("tests/fp8_tp_padding/*.py",),
    ),
)
