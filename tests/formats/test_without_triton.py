"""vLLM without a Triton that works, as on CPUs: its stand-in has no constexpr."""

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None
from vllm.triton_utils import HAS_TRITON
assert not HAS_TRITON
from vllm_patch.formats import compressed_tensors, fp8
from vllm_patch.fp8_tp_padding.kernels import columns, input_quant, masked_experts
from vllm_patch.fp8_tp_padding.kernels.warp_specialization import hopper_gate_up
assert hopper_gate_up() is None
"""


def test_layers_are_judged_and_experts_offered():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
