"""The FP8 operators that parity gives to CPUs without AMX, and nothing else does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_patch.cli import cpu_fp8
from vllm_patch.cli.cpu_fp8.operators import Operators

AVX2_ONLY = Path(__file__).parent / "avx2_only"
CHECKS = """
import torch
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.plugins import load_general_plugins
load_general_plugins()
experts = CPUExpertsFp8._supports_current_device()
print("checks:", experts, CPUFp8BlockScaledMMKernel.is_supported()[0])
"""


def checks(**env) -> str:
    """Return what vLLM thinks of its experts and linear layers on this CPU."""
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_process_of_its_own_is_left_as_it_is():
    """As ``vllm serve`` is: vLLM's checks for AMX stand."""
    has_amx = torch.cpu._is_amx_tile_supported()
    assert checks() == f"checks: {has_amx} {has_amx}"
    assert checks(PYTHONPATH=str(AVX2_ONLY)) == "checks: False False"


def test_a_process_that_parity_starts_has_operators():
    assert checks(**cpu_fp8.environment()) == "checks: True True"


def test_this_cpus_operators_are_right():
    assert cpu_fp8.checked(timeout=300) in {each.value for each in Operators}


def test_a_cpu_without_operators_gets_plain_torch(monkeypatch):
    """Also shows that a sitecustomize which ours hides still runs."""
    monkeypatch.setenv("PYTHONPATH", str(AVX2_ONLY), prepend=os.pathsep)
    assert cpu_fp8.checked(timeout=300) == Operators.PLAIN_TORCH.value


@pytest.mark.parametrize("wrong", ["scaled_mm", "_fused_experts"])
def test_a_wrong_operator_is_noticed(monkeypatch, tmp_path, wrong):
    """Off by 3 %: a scale of a block would be off by a factor."""
    (tmp_path / "sitecustomize.py").write_text(
        (AVX2_ONLY / "sitecustomize.py").read_text()
        + f"""
def _spoil(module):
    right = module.{wrong}
    def spoilt(*args):
        out = right(*args)
        if out is None:
            return args[0]["out"].mul_(1.03)
        return out * 1.03
    module.{wrong} = spoilt

wrapt.register_post_import_hook(_spoil, "vllm_patch.cli.cpu_fp8.plain_torch")
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(cpu_fp8.UsageError, match="is wrong on this CPU"):
        cpu_fp8.checked(timeout=300)
