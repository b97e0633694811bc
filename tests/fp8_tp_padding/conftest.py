"""Lets these tests run against the plugin as they do in a patched vLLM tree."""

import importlib
import pkgutil
import sys

import pytest

from tests.conftest import runs_tests

IN_TREE = "vllm.model_executor.layers.quantization.fp8_tp_padding"


# After the root conftest, which prepares the process for vLLM.
@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if not runs_tests(config):
        return
    from vllm_patch import fp8_tp_padding

    sys.modules[IN_TREE] = fp8_tp_padding
    prefix = f"{fp8_tp_padding.__name__}."
    for module in pkgutil.walk_packages(fp8_tp_padding.__path__, prefix):
        in_tree = module.name.replace(fp8_tp_padding.__name__, IN_TREE)
        sys.modules[in_tree] = importlib.import_module(module.name)


@pytest.fixture(autouse=True)
def padding_is_on(plugin):
    """As in a patched tree, where no test has to ask for it."""
