"""The FP8 operators that parity gives to CPUs without AMX, and nothing else does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vllm_patch
from vllm_patch.cli.cpu_fp8 import operators

AVX2_ONLY = (Path(__file__).parent / "avx2_only" / "sitecustomize.py").read_text()
CHECK = "vllm_patch.cli.cpu_fp8.check"
OPERATORS = "from vllm_patch.cli.cpu_fp8 import operators"
ASKS = f"{OPERATORS}; operators.install()"
# Of modules that import it, and do not run as parity's engine.
IMPORTS = "import vllm_patch.cli.engine_run, vllm_patch.cli.cpu_fp8.check"
SAYS = "WARNING FP8 operators on this CPU: "
LIKE_AMX = "import torch; torch.cpu._is_amx_tile_supported = lambda: True"
# The X86 is one of vLLM's other conditions.
ELSEWHERE = """
from vllm.platforms import CpuArchEnum, current_platform
type(current_platform).get_cpu_architecture = lambda *_: CpuArchEnum.ARM
"""
CHECKS = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.plugins import load_general_plugins
load_general_plugins()
asked = torch.cpu._is_amx_tile_supported()
experts = CPUExpertsFp8._supports_current_device
linear = CPUFp8BlockScaledMMKernel.is_supported
assert torch.cpu._is_amx_tile_supported() == asked, "the attention asks, too"
print("checks:", experts(), linear()[0], hasattr(experts, "__wrapped__"))
"""
CHECKED_AGAIN = f"{ELSEWHERE}print('elsewhere:', experts(), linear()[0])"


def checks(*lines: str, **env) -> tuple[str, str]:
    """Return what vLLM thinks of its experts and linear layers, and what is logged.

    Args:
        *lines: Run first.
        **env: Added to the environment.

    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, CHECKS, CHECKED_AGAIN])],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *_, found, _ = done.stdout.splitlines()
    return found, done.stdout + done.stderr


def check(folder: Path, *changes: str, code: str = "") -> subprocess.CompletedProcess:
    """Run the check, or other code, in a Python that starts with ``changes``."""
    (folder / "sitecustomize.py").write_text("\n".join(changes))
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", CHECK])],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_a_process_that_does_not_ask_is_left_as_it_is():
    """As ``vllm serve`` is, whatever it imports: vLLM's checks for AMX stand."""
    has_amx = torch.cpu._is_amx_tile_supported()
    found, log = checks(IMPORTS)
    assert found == f"checks: {has_amx} {has_amx} False"
    assert SAYS not in log


def test_nothing_that_python_runs_by_itself_asks():
    assert not list(Path(vllm_patch.__file__).parent.rglob("sitecustomize.py"))


def test_a_cpu_with_amx_is_left_as_it_is():
    found, log = checks(LIKE_AMX, ASKS)
    assert found == "checks: True True False"
    assert SAYS not in log


@pytest.mark.skipif(not operators.choose(), reason="this CPU has AMX")
def test_only_the_question_for_amx_is_answered_and_that_is_said():
    found, log = checks(ASKS)
    assert found == "checks: True True True"
    assert f"{SAYS}{operators.choose()}" in log
    assert "elsewhere: False True" in log


@pytest.mark.skipif(not operators.choose(), reason="this CPU has AMX")
def test_a_check_that_is_not_lifted_is_noticed(tmp_path):
    done = check(tmp_path, OPERATORS, "operators._answer = lambda module: None")
    assert done.returncode == 1
    assert "RuntimeError: vLLM's checks refuse its FP8 operators" in done.stderr


def test_operators_that_are_missing_are_not_replaced(tmp_path):
    """As where ``import vllm._C`` fails, which vLLM survives with a warning."""
    change = "operators.choose = lambda: operators.UNCHECKED"
    done = check(tmp_path, AVX2_ONLY, OPERATORS, change)
    assert done.returncode == 1
    assert "ImportError: vLLM's operators convert_weight_packed, fp8_" in done.stderr


# Off by 2 % for one number of tokens: a block's scale would be by a factor.
SPOIL = """
WRONG = ["", 0]

def _spoil(module, name):
    right = getattr(module, name)
    def spoilt(*args):
        out = right(*args)
        x = args[0]["hidden_states"] if isinstance(args[0], dict) else args[0]
        factor = 1.02 if [name, len(x)] == WRONG else 1
        if out is None:
            return args[0]["out"].mul_(factor)
        return out * factor
    setattr(module, name, spoilt)

def spoil(module):
    _spoil(module, "scaled_mm")
    _spoil(module, "_fused_experts")

wrapt.register_post_import_hook(spoil, "vllm_patch.cli.cpu_fp8.plain_torch")
"""
CHECK_EACH = """
import sitecustomize
from vllm_patch.cli.cpu_fp8 import check, operators
operators.install()
import vllm._custom_ops
check.run()
for sitecustomize.WRONG[:] in {wrong}:
    try:
        check.run()
    except RuntimeError as error:
        print(error)
"""


def test_a_cpu_without_operators_gets_plain_torch(tmp_path):
    """Which is right, and where it were not, is noticed: which, of how many tokens."""
    wrong = [["scaled_mm", 1], ["scaled_mm", 5], ["_fused_experts", 4]]
    done = check(tmp_path, AVX2_ONLY, SPOIL, code=CHECK_EACH.format(wrong=wrong))
    assert done.returncode == 0, done.stderr
    assert operators.PLAIN_TORCH in done.stderr
    for (function, tokens), line in zip(wrong, done.stdout.splitlines(), strict=True):
        name = "fused_experts_cpu" if "experts" in function else "fp8_scaled_mm_cpu"
        assert line.startswith(
            f"{name} is wrong on this CPU: of {tokens} tokens, a row is"
        )
