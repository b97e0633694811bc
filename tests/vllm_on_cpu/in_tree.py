"""Runs pytest in a vLLM source tree, on the CPU and without the plugin.

``python -m tests.vllm_on_cpu.in_tree TREE [PYTEST ARGUMENT...]``; without arguments
for pytest it imports the modules whose names it reads from stdin.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

from tests.vllm_on_cpu import install


def main(tree: Path, arguments: list[str]) -> int:
    here = Path(__file__).parents[2]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]
    sys.path.insert(0, str(tree))
    # An import of the plugin is an error from here on.
    sys.modules["vllm_patch"] = None
    install()
    import vllm

    assert Path(vllm.__file__).is_relative_to(tree), vllm.__file__
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # The tree has tests, too.
    os.chdir(tree)
    if not arguments:
        for name in sys.stdin.read().split():
            importlib.import_module(name)
        return 0
    # vLLM's own conftest.py and settings need all that vLLM's tests need.
    own = ["--noconftest", "-c", os.devnull, "--rootdir", str(tree)]
    return pytest.main([*own, "-q", "-p", "no:cacheprovider", *arguments])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
