# SPDX-License-Identifier: Apache-2.0
"""What this environment has, found without importing vLLM or torch."""

import os
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import vllm_patch
from vllm_patch import plugin, releases
from vllm_patch.wrappers import MODES, VARIABLE

GENERAL = "vllm.general_plugins"
NVIDIA_SMI = "nvidia-smi", "--format=csv,noheader"
# What tells vLLM where tuned files are, beside its own.
TUNED_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
# Of a driver that does not answer.
SECONDS = 10
_TUNED = re.compile(
    r"E=(\d+),N=(\d+),device_name=([^,]+),dtype=fp8_w8a8_masked,block_shape="
)


def mode() -> str:
    """Return what ``VLLM_FP8_TP_PADDING`` says."""
    return os.environ.get(VARIABLE, MODES[0])


def general_plugins() -> list[str]:
    """Return the names of the plugins that each process of vLLM loads here."""
    names = {point.name for point in metadata.entry_points(group=GENERAL)}
    allowed = os.environ.get("VLLM_PLUGINS")
    return sorted(names if allowed is None else names & {*allowed.split(",")})


def is_installed() -> bool:
    """Whether vLLM finds this package's plugin, be it allowed or not."""
    return plugin.NAME in metadata.entry_points(group=GENERAL).names


def nvidia_gpus(*fields: str) -> list[str]:
    """Return what ``nvidia-smi`` tells of each GPU; nothing where it does not run.

    Args:
        fields: Of ``nvidia-smi --help-query-gpu``.

    """
    command = [*NVIDIA_SMI, f"--query-gpu={','.join(fields)}"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        return done.stdout.splitlines() if done.returncode == 0 else []
    return []


def tuned_for(gpu: str) -> list[str]:
    """Return ``128 experts x 192 columns`` for each file of tuned tiles for a GPU.

    They are where VLLM_TUNED_CONFIG_FOLDER says, with this package and, where they are
    built in, with vLLM.
    """
    device = gpu.replace(" ", "_")
    # As vLLM names its own files.
    device = "NVIDIA_H200" if "H200" in device.split("_") else device
    ours = Path(vllm_patch.__file__).parent / "fp8_tp_padding" / "kernels"
    folders = [ours / "configs"]
    if package := releases.package():
        folders.append(package / "model_executor" / "layers" / "fused_moe" / "configs")
    if told := os.environ.get(TUNED_FOLDER):
        folders.append(Path(told))
    files = [_TUNED.match(file.name) for folder in folders for file in folder.glob("*")]
    found = {(int(m[1]), int(m[2])) for m in files if m and m[3] == device}
    return [f"{experts} experts x {size} columns" for experts, size in sorted(found)]
