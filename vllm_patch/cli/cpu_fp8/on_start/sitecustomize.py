# SPDX-License-Identifier: Apache-2.0
"""Python runs this when it starts, where this folder is on PYTHONPATH."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

from vllm_patch.cli.cpu_fp8 import operators

operators.install()

# The one that this hides.
HERE = Path(__file__).parent
others = [path for path in sys.path if Path(path or ".").resolve() != HERE.resolve()]
if hidden := PathFinder.find_spec("sitecustomize", others):
    hidden.loader.exec_module(module_from_spec(hidden))
