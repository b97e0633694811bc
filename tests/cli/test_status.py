"""What ``vllm-patch status`` says, and its exit code."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_patch import patch_table, plugin, releases
from vllm_patch.cli import environment, status
from vllm_patch.cli.main import main
from vllm_patch.patch_table import PATCHES, UnexpectedTarget


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_FP8_TP_PADDING", raising=False)
    monkeypatch.setattr(environment, "is_installed", lambda: True)


@pytest.fixture
def said(capsys):
    """Return the exit code of ``status`` and its rows by name."""

    def run(*arguments) -> tuple[int, dict[str, str]]:
        code = main(["status", *arguments])
        out = capsys.readouterr().out
        # The end of it, which a terminal shows.
        *_, summary, (last,) = [part.splitlines() for part in out.split("\n\n")]
        rows = {line[:12].strip(): line[12:] for line in summary}
        return code, {**rows, "all": out, "last": last}

    return run


def test_what_it_says(said):
    code, rows = said()
    assert code == 0
    assert rows["vLLM"].startswith(f"{importlib.import_module('vllm').__version__}, in")
    assert rows["supported"] == "0.26.0 to 0.33.0"
    assert rows["mode"] == "auto (VLLM_FP8_TP_PADDING)"
    assert rows["active"] == "yes, by the plugin"
    assert "Fp8Config.get_quant_method" in rows["all"]
    assert rows["last"].startswith("To do: nothing. ")


def test_it_imports_nothing_large():
    """Importing vLLM alone takes seven seconds."""
    script = (
        "import json, sys; from vllm_patch.cli.main import main; main(['status'])\n"
        "large = {'vllm', 'torch', 'triton', 'numpy'}\n"
        "print(json.dumps([*large & sys.modules.keys()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *_, table, imported = done.stdout.splitlines()
    assert table.startswith("To do: ")
    assert json.loads(imported) == []


def test_rows_that_this_vllm_does_not_have(said, monkeypatch):
    monkeypatch.setattr(releases, "installed", lambda: "0.28.0")
    _, rows = said()
    assert "not in this vLLM: vLLM 0.30.0 is the first that has it" in rows["all"]
    assert "QuarkConfig" not in rows["all"]
    assert "CompressedTensorsConfig" in rows["all"]


def test_an_inactive_plugin_replaces_nothing(said, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "off")
    code, rows = said()
    assert code == 1
    assert "  would replace  vllm.model_executor" in rows["all"]
    assert "  replaces" not in rows["all"]


@pytest.mark.parametrize(
    ("built_in", "variable", "value", "code", "active", "to_do"),
    [
        (False, "VLLM_FP8_TP_PADDING", "padded", 0, "yes, by the plugin", "nothing."),
        (
            *(False, "VLLM_PLUGINS", "", 1),
            *("no: VLLM_PLUGINS='' does not list vllm_patch.", "unset VLLM_PLUGINS"),
        ),
        (
            *(False, "VLLM_PLUGINS", "other", 1),
            *("no: VLLM_PLUGINS='other' does not list", "unset VLLM_PLUGINS, or add"),
        ),
        (
            *(False, "VLLM_FP8_TP_PADDING", "off", 1),
            *("no: VLLM_FP8_TP_PADDING=off.", "unset VLLM_FP8_TP_PADDING."),
        ),
        (
            *(False, "VLLM_FP8_TP_PADDING", "on", 1),
            *("no: VLLM_FP8_TP_PADDING=on, and vLLM would stop", "unset VLLM_FP8_TP"),
        ),
        (True, "VLLM_PLUGINS", "", 0, "yes, by vLLM itself, so the plugin", "nothing."),
        (
            *(True, "VLLM_FP8_TP_PADDING", "off", 1),
            *("no: VLLM_FP8_TP_PADDING=off.", "unset VLLM_FP8_TP_PADDING."),
        ),
    ],
)
def test_what_variables_do(
    monkeypatch, said, built_in, variable, value, code, active, to_do
):
    if built_in:
        monkeypatch.setattr(plugin, "built_in", lambda: "built in")
    monkeypatch.setenv(variable, value)
    found, rows = said()
    assert found == code
    assert rows["active"].startswith(active)
    assert rows["last"].startswith(f"To do: {to_do}")


@pytest.mark.parametrize(
    ("version", "active"),
    [
        (
            "0.34.0.dev7+g0123456",
            "no: this is vLLM 0.34.0.dev7+g0123456, and 0.26.0 to",
        ),
        ("dev", "no: this is vLLM dev, and 0.26.0 to"),
        (None, "no: vLLM is not installed in this environment"),
    ],
)
def test_a_vllm_that_is_not_supported(said, monkeypatch, version, active):
    monkeypatch.setattr(releases, "installed", lambda: version)
    code, rows = said()
    assert code == 1
    assert rows["active"].startswith(active)
    assert rows["last"].startswith("To do: install a vLLM that is supported")


def test_a_plugin_that_vllm_does_not_find(said, monkeypatch):
    monkeypatch.setattr(environment, "is_installed", lambda: False)
    code, rows = said()
    assert code == 1
    assert rows["active"] == "no: it is not installed, so vLLM does not find it."
    assert rows["last"].startswith("To do: pip install it into the environment")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_source_says_of_a_target_what_an_import_does(patch):
    if not patch.is_of(importlib.import_module("vllm").__version__):
        pytest.skip(f"{patch.name} is of vLLM {patch.since} and later")
    others = [dataclasses.replace(patch, attribute=f"{patch.attribute}_of_old")]
    if patch.parameters is not None:
        others.append(dataclasses.replace(patch, parameters=("self", "other")))
    for changed in (patch, *others):
        by_source = _error(patch_table.check_source, changed, releases.package())
        assert by_source == _error(patch_table.check, changed)
        assert (by_source is None) == (changed is patch)


def _error(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except UnexpectedTarget as error:
        return str(error)
    return None


def test_a_nightly_with_a_changed_signature(said, monkeypatch):
    """A patch release, too, may change what a row replaces."""
    row = dataclasses.replace(_row("layers"), parameters=("self", "layer"))
    monkeypatch.setattr(status, "PATCHES", (row,))
    code, rows = said()
    assert code == 1
    reason = "takes ('self', 'layer', 'prefix'), expected ('self', 'layer')"
    assert rows["active"].endswith(f"{reason}.")
    assert f"  but       {row.target} {reason}" in rows["all"]
    assert "a newer vllm-patch" in rows["last"]


def test_a_row_that_vllm_can_do_without(said, monkeypatch):
    row = dataclasses.replace(_row("masked"), parameters=())
    monkeypatch.setattr(status, "PATCHES", (_row("layers"), row))
    code, rows = said()
    assert code == 0
    assert "  but       vllm.model_executor.layers.fused_moe.oracle" in rows["all"]


def _row(name: str) -> patch_table.Patch:
    (row,) = (patch for patch in PATCHES if patch.name == name)
    return row


def test_a_target_that_is_not_vllms(said, monkeypatch, plugin):
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    plugin.unregister()
    monkeypatch.setattr(Fp8Config, "get_quant_method", None)
    assert said()[0] == 0
    code, rows = said("--import")
    assert code == 1
    assert "was already replaced by an object of builtins.NoneType" in rows["active"]
    assert "out of VLLM_PLUGINS" in rows["last"]


REPOSITORY = Path(__file__).parents[2]
OTHER_PLUGIN = """
def register():
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    stock = Fp8Config.get_quant_method
    def get_quant_method(self, layer, prefix):
        return stock(self, layer, prefix)
    Fp8Config.get_quant_method = get_quant_method
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Install this plugin and another one of the same target, in an order."""

    def install(*order: str) -> None:
        (tmp_path / "other_plugin.py").write_text(OTHER_PLUGIN)
        # This repository last: an editable installation's egg-info may be in it.
        others = [*filter(None, [os.environ.get("PYTHONPATH")]), str(REPOSITORY)]
        paths = [str(tmp_path)]
        for name in order:
            dist = tmp_path / name / f"{name}-1.dist-info"
            dist.mkdir(parents=True)
            (dist / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
            module = "vllm_patch.plugin" if name == "vllm_patch" else "other_plugin"
            (dist / "entry_points.txt").write_text(
                f"[vllm.general_plugins]\n{name} = {module}:register\n"
            )
            paths.append(str(tmp_path / name))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *others]))
        # vLLM's names, without those that this environment has.
        monkeypatch.setenv("VLLM_PLUGINS", "vllm_patch,other")

    return install


@pytest.mark.parametrize(
    ("order", "code", "says"),
    [
        (
            *(("vllm_patch", "other"), 0),
            "other_plugin.register.<locals>.get_quant_method was put on top, and must",
        ),
        (
            *(("other", "vllm_patch"), 1),
            "was already replaced by other_plugin.register.<locals>.get_quant_method",
        ),
    ],
)
def test_two_plugins_at_one_target(plugins, tmp_path, order, code, says):
    """In whichever order vLLM loads them: it is named, and never replaced."""
    plugins(*order)
    script = """
import sys
from tests.vllm_on_cpu import install
install()
from vllm_patch.cli.main import main
sys.exit(main(["status", "--import"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout
    assert "plugins     other, vllm_patch" in done.stdout


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Let ``nvidia-smi`` print lines, or do something else."""

    def install(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo NVIDIA H200; echo NVIDIA H200",
            "2 x NVIDIA H200: tuned tiles for 128 experts x 96 columns, 128 experts x ",
        ),
        ("echo NVIDIA H200 NVL", "1 x NVIDIA H200 NVL: tuned tiles for 128 experts"),
        ("echo NVIDIA L4", "1 x NVIDIA L4: no tuned tiles, a rule for the rest"),
        ("echo no driver; exit 9", "none that nvidia-smi knows"),
        (
            f"exec {sys.executable} -c 'import time; time.sleep(20); print(\"late\")'",
            "none that nvidia-smi knows",
        ),
    ],
    ids=["two", "variant", "other", "fails", "hangs"],
)
def test_tuned_tiles_for_the_gpu(said, gpus, monkeypatch, script, says):
    monkeypatch.setattr(environment, "SECONDS", 1)
    gpus(script)
    assert said()[1]["GPU"].startswith(says)


def test_tuned_tiles_are_found_by_the_name_that_kernels_look_for(monkeypatch):
    """H200 is the one for which there are some."""
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm_patch.fp8_tp_padding.kernels import tuned_tiles

    monkeypatch.setattr(
        fused_moe.current_platform, "get_device_name", lambda *_: "NVIDIA H200"
    )
    tuned = environment.tuned_for("NVIDIA H200")
    assert tuned
    for experts, _, _, columns, _ in map(str.split, tuned):
        name = tuned_tiles.config_name(int(experts), int(columns))
        assert (Path(tuned_tiles.CONFIGS) / name).is_file()


def test_tuned_tiles_of_the_user_are_found(monkeypatch, tmp_path):
    name = "E=4,N=48,device_name=NVIDIA_L4,dtype=fp8_w8a8_masked,block_shape=[128,128]"
    (tmp_path / f"{name}.json").touch()
    assert not environment.tuned_for("NVIDIA L4")
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert environment.tuned_for("NVIDIA L4") == ["4 experts x 48 columns"]
