"""What ``vllm-patch collect-env`` tells, and what it keeps to itself."""

import getpass
import importlib
import os
import socket
from pathlib import Path

import pytest

from vllm_patch.cli import collect_env, environment
from vllm_patch.cli.main import main

PRIVATE = {
    "VLLM_API_KEY": "sk-0123",
    "VLLM_HOST_IP": "10.1.2.3",
    "VLLM_CACHE_ROOT": "/home/somebody/cache",
    "VLLM_USE_MODELSCOPE": "/home/somebody/hub",
    "VLLM_FP8_TP_PADDING": "sk-4567",
    "HF_TOKEN": "hf_8901",
}


@pytest.fixture
def collected(capsys):
    def run() -> dict[str, str]:
        assert main(["collect-env"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line[:12].strip(): line[12:] for line in lines}

    return run


def test_what_a_report_needs(collected, monkeypatch):
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    monkeypatch.setattr(environment, "is_installed", lambda: True)
    monkeypatch.setattr(
        environment, "nvidia_gpus", lambda *_: ["NVIDIA H200, 580.1, 9.0"] * 2
    )
    rows = collected()
    assert rows.keys() == collect_env.PROBES.keys()
    assert rows["vLLM"] == importlib.import_module("vllm").__version__
    assert rows["padding"] == "by the plugin"
    assert rows["GPU"] == "2 x NVIDIA H200, 580.1, 9.0"
    assert "torch 2." in rows["packages"]
    assert "VLLM_USE_DEEP_GEMM=0" in rows["variables"]
    assert not any(value.startswith("unknown") for value in rows.values())


@pytest.mark.parametrize(
    "variable", [("VLLM_FP8_TP_PADDING", "off"), ("VLLM_PLUGINS", "other")]
)
def test_it_says_what_status_says(collected, monkeypatch, variable):
    monkeypatch.setattr(environment, "is_installed", lambda: True)
    monkeypatch.setenv(*variable)
    assert collected()["padding"] == "none: vllm-patch status says why"


def test_nothing_private_is_told(collected, monkeypatch):
    for name, value in PRIVATE.items():
        monkeypatch.setenv(name, value)
    rows = collected()
    assert "VLLM_API_KEY (set)" in rows["variables"]
    text = "\n".join(rows.values())
    places = str(Path.home()), os.getcwd(), socket.gethostname()
    for private in (*PRIVATE.values(), *places):
        assert private not in text
    words = text.replace("/", " ").split()
    assert getpass.getuser() not in words


@pytest.mark.parametrize("probe", ["_cpu", "_packages", "_gpus"])
def test_a_probe_that_fails_leaves_the_others(collected, monkeypatch, probe):
    (name,) = (n for n, p in collect_env.PROBES.items() if p.__name__ == probe)

    def broken():
        raise RuntimeError("in /home/somebody")

    monkeypatch.setitem(collect_env.PROBES, name, broken)
    rows = collected()
    assert rows[name] == "unknown (RuntimeError)"
    assert rows.keys() == collect_env.PROBES.keys()
