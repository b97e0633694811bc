"""What ``vllm-patch status`` says, and its exit code."""

import pytest

from vllm_patch import plugin
from vllm_patch.cli import status
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


def test_rows_that_this_vllm_does_not_have(capsys, monkeypatch):
    monkeypatch.setattr(status, "_vllm_version", lambda: "0.28.0 (vllm)")
    main(["status"])
    out = capsys.readouterr().out
    assert "not in this vLLM: vLLM 0.30.0 is the first that has it" in out
    assert "QuarkConfig" not in out
    assert "CompressedTensorsConfig" in out


def test_an_inactive_plugin_replaces_nothing(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "  would replace  vllm.model_executor" in out
    assert "  replaces" not in out


@pytest.mark.parametrize(
    ("built_in", "variable", "value", "code", "says"),
    [
        (
            *(False, "VLLM_FP8_TP_PADDING", "padded", 0),
            "yes, in every vLLM process (VLLM_FP8_TP_PADDING=padded)",
        ),
        (False, "VLLM_PLUGINS", "", 1, "no: VLLM_PLUGINS='' does not list vllm_patch."),
        (False, "VLLM_PLUGINS", "other", 1, "no: VLLM_PLUGINS='other' does not list"),
        (False, "VLLM_FP8_TP_PADDING", "off", 1, "no: VLLM_FP8_TP_PADDING=off."),
        (
            *(False, "VLLM_FP8_TP_PADDING", "on", 1),
            "no: VLLM_FP8_TP_PADDING=on, and vLLM would stop",
        ),
        (
            *(True, "VLLM_PLUGINS", "", 0),
            "not needed: built in, so the plugin stands down",
        ),
        (True, "VLLM_FP8_TP_PADDING", "off", 1, "no: VLLM_FP8_TP_PADDING=off."),
    ],
)
def test_what_variables_do(monkeypatch, capsys, built_in, variable, value, code, says):
    if built_in:
        monkeypatch.setattr(plugin, "built_in", lambda: "built in")
    monkeypatch.setenv(variable, value)
    assert main(["status"]) == code
    assert f"active      {says}" in capsys.readouterr().out


def test_a_target_that_is_not_vllms(monkeypatch, capsys):
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    monkeypatch.setattr(Fp8Config, "get_quant_method", None)
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "was already replaced by an object of builtins.NoneType" in out
