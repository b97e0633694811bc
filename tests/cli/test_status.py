"""What ``vllm-patch status`` says, and its exit code."""

import pytest

from vllm_patch import plugin
from vllm_patch.cli.main import main


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_FP8_TP_PADDING", raising=False)


def test_the_table(capsys):
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "active      yes, in every vLLM process" in out
    assert "Fp8Config.get_quant_method" in out


def test_whole_blocks_for_all_layers(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "padded")
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "yes, in every vLLM process (VLLM_FP8_TP_PADDING=padded)" in out


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("VLLM_PLUGINS", "", "VLLM_PLUGINS='' does not list vllm_patch."),
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS='other' does not list vllm_patch."),
        ("VLLM_FP8_TP_PADDING", "off", "VLLM_FP8_TP_PADDING=off."),
        ("VLLM_FP8_TP_PADDING", "on", "VLLM_FP8_TP_PADDING=on, and vLLM would stop"),
    ],
)
def test_what_turns_it_off(monkeypatch, capsys, variable, value, reason):
    monkeypatch.setenv(variable, value)
    assert main(["status"]) == 1
    assert f"active      no: {reason}" in capsys.readouterr().out


def test_a_target_that_is_not_vllms(monkeypatch, capsys):
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    monkeypatch.setattr(Fp8Config, "get_quant_method", None)
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "was already replaced by an object of builtins.NoneType" in out


@pytest.mark.parametrize(
    ("variable", "value", "code", "says"),
    [
        ("VLLM_PLUGINS", "", 0, "not needed: built in, so the plugin stands down"),
        ("VLLM_FP8_TP_PADDING", "off", 1, "no: VLLM_FP8_TP_PADDING=off."),
    ],
)
def test_a_vllm_that_has_the_patches(monkeypatch, capsys, variable, value, code, says):
    monkeypatch.setattr(plugin, "built_in", lambda: "built in")
    monkeypatch.setenv(variable, value)
    assert main(["status"]) == code
    assert f"active      {says}" in capsys.readouterr().out
