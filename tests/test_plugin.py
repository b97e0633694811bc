"""What ``register`` does to a vLLM, and when it keeps its hands off."""

import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_patch import patch_table, releases
from vllm_patch import plugin as plugin_module
from vllm_patch.cli.main import main
from vllm_patch.series.diffs import STOCK

TARGETS = {patch.name: patch for patch in patch_table.PATCHES}


@pytest.fixture
def fp8_config():
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config


@pytest.fixture
def warnings(caplog):
    """Return the plugin's warnings so far, as a function of no arguments."""
    caplog.set_level(logging.WARNING, "vllm.vllm_patch")
    return lambda: [r for r in caplog.records if r.name == "vllm.vllm_patch"]


def test_register_is_idempotent_and_reversible(fp8_config):
    import vllm.envs

    stock, variables = fp8_config.get_quant_method, vllm.envs.environment_variables
    for _ in range(2):
        plugin_module.register()
        patched = fp8_config.get_quant_method
        plugin_module.register()
        assert fp8_config.get_quant_method is patched is not stock
        assert vllm.envs.VLLM_FP8_TP_PADDING == "auto"
        plugin_module.unregister()
        assert fp8_config.get_quant_method is stock
        assert vllm.envs.environment_variables is variables
        plugin_module.unregister()


def test_unknown_value_of_the_variable_stops_the_start(monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "on")
    allowed = "'auto', 'padded', 'off'"
    try:
        with pytest.raises(
            ValueError, match=f"'on' for VLLM_FP8_TP_PADDING.*{allowed}"
        ):
            plugin_module.register()
    finally:
        plugin_module.unregister()


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "dev", "0.33.0rc1"])
def test_unknown_release_stays_stock(fp8_config, monkeypatch, warnings, version):
    import vllm

    stock = fp8_config.get_quant_method
    monkeypatch.setattr(vllm, "__version__", version)
    plugin_module.register()
    assert fp8_config.get_quant_method is stock
    (warning,) = warnings()
    assert (
        f"inactive and vLLM stays stock: this is vLLM {version}, and 0.26.0 to 0.33.0 "
        "are supported. Install a supported release, or a newer vllm-patch."
    ) in warning.getMessage()


def test_local_builds_of_a_release_are_that_release():
    assert releases.is_supported("0.32.0+cpu")
    assert releases.is_supported("0.33.0+cu130")


def test_a_patch_release_is_taken(fp8_config, monkeypatch, warnings):
    """If it changed a target, its signature says so."""
    import vllm

    stock = fp8_config.get_quant_method
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    plugin_module.register()
    try:
        assert fp8_config.get_quant_method is not stock
        assert not warnings()
    finally:
        plugin_module.unregister()
    assert not releases.is_supported("0.33.1.dev3+g0123456")


def test_only_the_first_process_warns(monkeypatch, warnings):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "somebody")
    plugin_module.register()
    assert not warnings()


@pytest.mark.parametrize("left", [None, ModuleType("vllm")], ids=["nothing", "folder"])
def test_missing_vllm_is_one_clear_line(monkeypatch, warnings, left):
    monkeypatch.setitem(sys.modules, "vllm", left)
    monkeypatch.setattr(plugin_module, "built_in", lambda: None)
    plugin_module.register()
    (warning,) = warnings()
    assert "vLLM is not installed in this environment" in warning.getMessage()


def test_another_signature_stays_stock(fp8_config, monkeypatch, warnings):
    stock = fp8_config.get_quant_method
    row = dataclasses.replace(TARGETS["layers"], parameters=("self", "layer"))
    monkeypatch.setattr(plugin_module, "PATCHES", (TARGETS["env-var"], row))
    plugin_module.register()
    assert fp8_config.get_quant_method is stock
    (warning,) = warnings()
    assert (
        "takes ('self', 'layer', 'prefix'), expected ('self', 'layer')"
        in warning.getMessage()
    )


def somebody_elses(self, layer, prefix):
    raise AssertionError("not called")


def wrapping(stock):
    return functools.wraps(stock)(lambda self, layer, prefix: stock)


@pytest.mark.parametrize(
    ("replace", "name"),
    [
        (lambda stock: somebody_elses, f"{__name__}.somebody_elses"),
        (wrapping, f"{__name__}.Fp8Config.get_quant_method"),
        (functools.partial, "an object of functools.partial"),
        (functools.partialmethod, "an object of functools.partialmethod"),
        (staticmethod, "an object of builtins.staticmethod"),
    ],
    ids=["function", "wraps", "partial", "partialmethod", "staticmethod"],
)
def test_somebody_elses_replacement_is_named_and_kept(
    fp8_config, monkeypatch, warnings, replace, name
):
    replaced = replace(vars(fp8_config)["get_quant_method"])
    monkeypatch.setattr(fp8_config, "get_quant_method", replaced)
    plugin_module.register()
    assert vars(fp8_config)["get_quant_method"] is replaced
    (warning,) = warnings()
    assert f"was already replaced by {name}, so vllm_patch leaves it alone" in (
        warning.getMessage()
    )


def test_without_masked_experts_layers_are_still_taken(
    fp8_config, monkeypatch, warnings
):
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle

    def somebodys(backend):
        raise AssertionError("not called")

    stock = fp8_config.get_quant_method
    monkeypatch.setattr(oracle, "backend_to_kernel_cls", somebodys)
    plugin_module.register()
    assert oracle.backend_to_kernel_cls is somebodys
    assert fp8_config.get_quant_method is not stock
    plugin_module.unregister()
    (warning,) = warnings()
    assert warning.getMessage().endswith(
        "leaves it alone: experts are padded, and not multiplied by masked kernels."
    )


def test_unregister_keeps_what_somebody_put_on_top(fp8_config, monkeypatch, warnings):
    stock = fp8_config.get_quant_method
    plugin_module.register()
    monkeypatch.setattr(fp8_config, "get_quant_method", somebody_elses)
    plugin_module.unregister()
    assert fp8_config.get_quant_method is somebody_elses
    (warning,) = warnings()
    assert f"was replaced by {__name__}.somebody_elses after vllm_patch did" in (
        warning.getMessage()
    )
    monkeypatch.undo()
    plugin_module.unregister()
    assert fp8_config.get_quant_method is stock


def test_a_target_that_is_gone_stays_stock(fp8_config, monkeypatch, warnings):
    monkeypatch.delattr(fp8_config, "get_quant_method")
    plugin_module.register()
    (warning,) = warnings()
    assert f"{TARGETS['layers'].target} does not exist" in warning.getMessage()


def printed_by(script: str):
    """Return the JSON that ``script`` prints last, in a new Python."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_without_fp8_imports_nothing_for_it():
    assert (
        printed_by("""
import json, sys
import vllm, vllm_patch.plugin
before = set(sys.modules)
vllm_patch.plugin.register()
print(json.dumps(sorted(set(sys.modules) - before)))
""")
        == []
    )


def test_fp8_is_patched_as_soon_as_it_is_imported():
    assert printed_by("""
import json, sys
from tests.vllm_on_cpu import install
install()
import vllm_patch.plugin
vllm_patch.plugin.register()
fp8 = "vllm.model_executor.layers.quantization.fp8"
lazy = fp8 not in sys.modules
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
print(json.dumps([lazy, hasattr(Fp8Config.get_quant_method, "__wrapped__")]))
""") == [True, True]


def test_importing_the_package_does_nothing():
    """It brings the geometry along, which imports dataclasses only."""
    others, ours = printed_by("""
import json, sys, vllm_patch
others = {"vllm", "torch", "triton", "wrapt"} & sys.modules.keys()
ours = [name for name in sys.modules if name.startswith("vllm_patch.")]
print(json.dumps([list(others), [name for name in ours if ".slices" not in name]]))
""")
    assert others == [] and ours == ["vllm_patch.fp8_tp_padding"]


@pytest.fixture
def patched_vllm(tmp_path, monkeypatch) -> Path:
    """A copy of the vLLM under test, with the git patches; new Pythons import it."""
    import vllm

    if vllm.__version__ not in STOCK:
        pytest.skip("this release has no git patches")
    tree = tmp_path / "vllm-src"
    package = Path(vllm.__path__[0])
    for folder in (package, package.parent / "vllm.egg-info"):
        shutil.copytree(folder, tree / folder.name)
    assert main(["apply", str(tree)]) == 0
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(tree))
    return tree


REGISTER_TWICE = """
import json, logging, sys
from tests.vllm_on_cpu import install
install()
import vllm_patch.plugin
said = []
logger = logging.getLogger("vllm.vllm_patch")
logger.handle = lambda record: said.append(record.getMessage())
for _ in range(2):
    vllm_patch.plugin.register()
import vllm.envs
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
print(json.dumps([
    said,
    hasattr(Fp8Config.get_quant_method, "__wrapped__"),
    vllm.envs.VLLM_FP8_TP_PADDING,
    [module for module in sys.modules if "fp8_tp_padding.methods" in module],
]))
"""
FOLDER = "vllm/model_executor/layers/quantization/fp8_tp_padding"


def test_the_plugin_stands_down_in_a_patched_vllm(patched_vllm):
    said, wrapped, mode, modules = printed_by(REGISTER_TWICE)
    (line,) = said
    where = patched_vllm / FOLDER
    assert line == (
        f"vllm_patch stands down: this vLLM has the padding built in, in {where}. "
        "That pads plain FP8 only."
    )
    assert not wrapped
    assert mode == "auto"
    assert modules == []


def test_a_folder_that_an_upgrade_left_behind_is_no_reason(patched_vllm):
    import vllm

    for hooked in (path for path in STOCK[vllm.__version__] if path[:5] == "vllm/"):
        shutil.copyfile(Path(vllm.__path__[0]).parent / hooked, patched_vllm / hooked)
    said, wrapped, mode, _ = printed_by(REGISTER_TWICE)
    assert said == []
    assert wrapped
    assert mode == "auto"
