# SPDX-License-Identifier: Apache-2.0
"""The series: which file goes upstream in which commit.

Each commit is a pull request of its own: it brings its tests, and does not need the
next one.
"""

from dataclasses import dataclass
from pathlib import Path

MESSAGES = Path(__file__).parent / "messages"
LIBRARY = "vllm/model_executor/layers/quantization/fp8_tp_padding"
# A folder that jobs of vLLM's CI collect in each release.
TESTS = "tests/kernels/quantization/fp8_tp_padding"
# vLLM's own folder, of which wheels have all files.
CONFIGS = "vllm/model_executor/layers/fused_moe/configs"


@dataclass(frozen=True)
class Commit:
    """One patch of the series.

    Attributes:
        name: Names the commit's hooks, ``hooks/*/NAME.diff``, and its message.
        sources: Files of ``fp8_tp_padding/`` that come with it; ``*`` as in a shell.
        tests: Files of ``tests/fp8_tp_padding/`` that do.

    """

    name: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def message(self) -> str:
        """Subject, blank line, body; the sign-off is added."""
        return (MESSAGES / f"{self.name}.txt").read_text(encoding="utf-8")


COMMITS = (
    Commit(
        name="experts",
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
            "test_linear_binaries.py",
            "test_linear_forward.py",
            "test_linear_loading.py",
            "test_linear_lora.py",
            "test_linear_properties.py",
            "test_humming.py",
            "test_marlin.py",
            "test_packed_projections.py",
            "test_sleep.py",
            "triton_keys.py",
        ),
    ),
    Commit(
        name="masked",
        sources=(
            "kernels/masked_*.py",
            "kernels/hopper_gate_up.py",
            "kernels/pair_kernels.py",
            "kernels/launches.py",
            "kernels/workspace.py",
            "kernels/tiles.py",
            "kernels/tuned_tiles.py",
            "kernels/tile_choice.py",
            "kernels/warp_specialization.py",
            "kernels/configs/*.json",
        ),
        tests=(
            "test_expert_store.py",
            "test_launches.py",
            "test_masked_moe.py",
            "test_masked_warmup.py",
            "test_tiles.py",
            "test_warp_specialization.py",
        ),
    ),
)
