# SPDX-License-Identifier: Apache-2.0
"""The series: which file goes upstream in which commit, and why.

Each commit is a pull request of its own: it brings its tests, and does not need the
next one.
"""

from dataclasses import dataclass

LIBRARY = "vllm/model_executor/layers/quantization/fp8_tp_padding"
# A folder that jobs of vLLM's CI collect in each release.
TESTS = "tests/kernels/quantization/fp8_tp_padding"
# vLLM's own folder, of which wheels have all files.
CONFIGS = "vllm/model_executor/layers/fused_moe/configs"


@dataclass(frozen=True)
class Commit:
    """One patch of the series.

    Attributes:
        name: Names the commit's hooks: ``hooks/*/NAME.diff``.
        message: Subject, blank line, body; the sign-off is added.
        sources: Files of ``fp8_tp_padding/`` that come with it; ``*`` as in a shell.
        tests: Files of ``tests/fp8_tp_padding/`` that do.

    """

    name: str
    message: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]


COMMITS = (
    Commit(
        name="experts",
        message="""\
[Quantization] Load block-FP8 experts at any tensor-parallel size

A rank of a block-quantized FP8 MoE layer owns intermediate_size / tp_size
columns. Where that is not a multiple of the 128x128 block, loading fails
(Qwen3-235B at TP 8: 192 columns), or refines all blocks to smaller ones.

Put the rank's slice into a buffer of whole blocks instead, at the offset
inside a block that it has in the checkpoint, between zeros. Each block then
keeps its scale: nothing is requantized, and the kernels see a layer of whole
blocks. slices/shard.py holds the geometry, methods/experts.py a subclass of
Fp8MoEMethod that uses it.

Layers whose size keeps blocks whole get Fp8MoEMethod as before.
VLLM_FP8_TP_PADDING=off goes back to that for all layers.

LoRA adapters of such experts are cut like the weights: decorators of the
three functions that slice them put a rank's columns where the weights are.

Where vLLM has it, this takes the place of whole-block shards for explicit
backends (pad_tp_shard_to_weight_blocks), which leave the last ranks empty.
Refined blocks stay for layers that are not padded, such as those of a hidden
size that is not of whole blocks.

Issue: https://github.com/vllm-project/vllm/issues/17569
""",
        sources=(
            "__init__.py",
            "slices/__init__.py",
            "slices/shard.py",
            "slices/window.py",
            "loading/__init__.py",
            "loading/lora_slices.py",
            "loading/sliced_tensor.py",
            "loading/expert_loader.py",
            "methods/__init__.py",
            "methods/experts.py",
            "methods/store.py",
            "methods/engagement.py",
        ),
        tests=(
            "__init__.py",
            "exact.py",
            "experts.py",
            "moe_reference.py",
            "tensor_parallel.py",
            "test_expert_errors.py",
            "test_lora.py",
            "test_moe_forward.py",
            "test_moe_loading.py",
            "test_shard.py",
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
row-parallel layers pad their input while they quantize it. Layers that are
not cut get Fp8LinearMethod as before.

Issue: https://github.com/vllm-project/vllm/issues/52997
""",
        sources=(
            "slices/linear_layout.py",
            "loading/linear_loader.py",
            "methods/linear.py",
            "kernels/__init__.py",
            "kernels/fp8_quant.py",
            "kernels/input_quant.py",
            "kernels/columns.py",
            "kernels/dependent_launch.py",
        ),
        tests=(
            "test_columns.py",
            "test_dependent_launch.py",
            "test_input_quant.py",
            "test_linear_forward.py",
            "test_linear_loading.py",
            "test_linear_lora.py",
            "test_linear_properties.py",
            "test_marlin.py",
        ),
    ),
    Commit(
        name="masked",
        message="""\
[Kernel] Fused-MoE Triton kernels for experts cut inside a quant block

Where vLLM would choose TritonExperts, store a rank's real columns only, and
multiply them with kernels that know where they lie on the checkpoint's grid
of blocks: loads are masked and bounded to real columns, and scales are taken
by a column's place on the grid. SiLU * up is part of the first product, and
the quantization of the intermediate of the second. No padding is stored.

The oracle offers MaskedTritonExperts before TritonExperts; they refuse every
layer that is not cut inside a block.

Issue: https://github.com/vllm-project/vllm/issues/17569
""",
        sources=(
            "kernels/masked_*.py",
            "kernels/workspace.py",
            "kernels/tiles.py",
            "kernels/tuned_tiles.py",
            "kernels/tile_choice.py",
            "kernels/configs/*.json",
        ),
        tests=("test_expert_store.py", "test_masked_moe.py", "test_tiles.py"),
    ),
)
