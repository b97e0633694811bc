"""The table, the code and the README say the same."""

import importlib
from pathlib import Path

import pytest

from vllm_patch import releases
from vllm_patch.patch_table import PATCHES

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_row_names_code_that_exists(patch):
    if not patch.is_of(importlib.import_module("vllm").__version__):
        pytest.skip(f"{patch.name} is of vLLM {patch.since} and later")
    owner = importlib.import_module(patch.module)
    for part in patch.attribute.split("."):
        owner = getattr(owner, part)


def test_readme_names_every_format():
    """And since which release, if not in all."""
    lines = [x for x in README.read_text().splitlines() if x.startswith("|")]
    formats = [patch for patch in PATCHES if patch.attribute.endswith("_quant_method")]
    assert len(formats) > 1
    for patch in formats:
        name = "fp8" if patch.name == "layers" else patch.name
        (line, *_) = [
            line for line in lines if line.startswith("|") and f"`{name}`" in line
        ]
        if patch.since != releases.SUPPORTED[0]:
            assert f"from vLLM {patch.since.removesuffix('.0')}" in line


def test_readme_names_the_supported_releases():
    first, last = releases.SUPPORTED[0], releases.SUPPORTED[-1]
    assert f"vLLM {first} to {last}" in README.read_text()
