# SPDX-License-Identifier: Apache-2.0
"""``vllm-patch status``: what is replaced in this environment's vLLM, and what to do.

vLLM is read and not imported, which would take most of ten seconds.
"""

import argparse
import os
import platform
from collections import Counter
from functools import partial

from vllm_patch import __version__, patch_table, plugin, releases
from vllm_patch.cli import environment
from vllm_patch.patch_table import PATCHES, Patch, UnexpectedTarget
from vllm_patch.wrappers import MODES, OFF, VARIABLE

NOTHING = (
    "nothing. Where a model's layers are cut inside a quant block, rank 0 logs `FP8 "
    "layers cut inside quant blocks: ...` while it loads."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status",
        help="show whether the plugin is at work, what it replaces, and what to do",
        description="Show whether vLLM pads cut layers here, what is replaced for it, "
        "and what to do. Exit code: 0 if it does, 1 if not.",
        epilog="example: vllm-patch status --import",
    )
    parser.add_argument(
        "--import",
        action="store_true",
        dest="imports",
        help="import vLLM and its plugins, and look who holds what this one replaces",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the patch table, versions and what to do; return 0 if vLLM will pad."""
    version, built_in = releases.installed(), plugin.built_in()
    rows = _rows(version)
    problem, remedy, remarks = _verdict(version, built_in, args.imports)
    is_replaced = not (problem or built_in)
    for patch in PATCHES:
        _print(patch, patch in rows, is_replaced, remarks.get(patch.name))
    by = "vLLM itself, so the plugin stands down" if built_in else "the plugin"
    supported = f"{releases.SUPPORTED[0]} to {releases.SUPPORTED[-1]}"
    # Below the long table, where a terminal shows it.
    for name, value in (
        ("vllm-patch", __version__),
        ("vLLM", f"{version}, in {releases.package()}" if version else "not installed"),
        ("supported", supported),
        ("Python", platform.python_version()),
        ("mode", f"{environment.mode()} ({VARIABLE})"),
        *_gpus(),
        ("plugins", ", ".join(environment.general_plugins()) or "none"),
        ("active", f"no: {problem}" if problem else f"yes, by {by}"),
    ):
        print(f"{name:<12}{value}")
    print(f"\nTo do: {remedy if problem else NOTHING}")
    return 1 if problem else 0


def is_active() -> bool:
    """Whether vLLM would pad layers if it started here and now."""
    problem, _, _ = _verdict(releases.installed(), plugin.built_in(), imports=False)
    return not problem


def _rows(version: str | None) -> list[Patch]:
    is_known = version is not None and releases.is_supported(version)
    return [patch for patch in PATCHES if not is_known or patch.is_of(version)]


def _verdict(
    version: str | None, built_in: str | None, imports: bool
) -> tuple[str, str, dict[str, str]]:
    """Return why not, if not, and what to do; and what is wrong with rows by name."""
    problem, remedy = _refusal(version, built_in)
    if problem or built_in:
        return problem, remedy, {}
    rows = _rows(version)
    remarks = _by_import(rows) if imports else _by_source(rows)
    return *_unfit(rows, remarks), remarks


def _gpus() -> list[tuple[str, str]]:
    """Return a row for each kind of GPU: whether there are tuned tiles for it."""
    rows = []
    for name, count in Counter(environment.nvidia_gpus("name")).items():
        tuned = ", ".join(environment.tuned_for(name))
        tiles = f"tuned tiles for {tuned}" if tuned else "no tuned tiles"
        rows.append(("GPU", f"{count} x {name}: {tiles}, a rule for the rest"))
    return rows or [("GPU", "none that nvidia-smi knows")]


def _print(patch: Patch, is_here: bool, is_replaced: bool, remark: str | None) -> None:
    print(f"{patch.name}: {patch.why}")
    if not is_here:
        print(f"  not in this vLLM: vLLM {patch.since} is the first that has it\n")
        return
    print(f"  {'replaces' if is_replaced else 'would replace'}  {patch.target}")
    if remark:
        print(f"  but       {remark}")
    print(f"  until     {patch.until}")
    print(f"  see       {patch.link}\n")


def _refusal(version: str | None, built_in: str | None) -> tuple[str, str]:
    """Return why vLLM would not look at its targets, and what to do; or nothing."""
    if not built_in and (problem := plugin.unsupported(version)):
        return problem, "install a vLLM that is supported, or a newer vllm-patch."
    allowed, mode = os.environ.get("VLLM_PLUGINS"), environment.mode()
    if mode == OFF:
        return f"{VARIABLE}={OFF}.", f"unset {VARIABLE}."
    if mode not in MODES:
        return (
            f"{VARIABLE}={mode}, and vLLM would stop.",
            f"unset {VARIABLE}, or give one of {', '.join(MODES)}.",
        )
    if built_in:
        return "", ""
    if not environment.is_installed():
        return (
            "it is not installed, so vLLM does not find it.",
            "pip install it into the environment that runs vLLM, on each node.",
        )
    if allowed is not None and plugin.NAME not in allowed.split(","):
        return (
            f"VLLM_PLUGINS={allowed!r} does not list {plugin.NAME}.",
            f"unset VLLM_PLUGINS, or add {plugin.NAME} to it.",
        )
    return "", ""


def _unfit(rows: list[Patch], remarks: dict[str, str]) -> tuple[str, str]:
    """Return why vLLM stays stock, and what to do, if a row must be and cannot."""
    for patch in rows:
        is_fit = patch.without or patch_table.put_on_top(patch)
        if patch.name in remarks and not is_fit:
            remedy = (
                "install vLLM as it was published, or a newer vllm-patch, and leave "
                "plugins that replace the same out of VLLM_PLUGINS."
            )
            return f"{remarks[patch.name]}.", remedy
    return "", ""


def _by_source(rows: list[Patch]) -> dict[str, str]:
    """Return what is wrong with rows' targets, by name, in vLLM's source."""
    return _remarks(rows, partial(patch_table.check_source, package=releases.package()))


def _by_import(rows: list[Patch]) -> dict[str, str]:
    """Return the same of a vLLM that has loaded its plugins, as each process does."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    remarks = _remarks(rows, patch_table.check)
    for patch in rows:
        if other := patch_table.put_on_top(patch):
            remarks[patch.name] = f"{other} was put on top, and must call it"
    return remarks


def _remarks(rows, check) -> dict[str, str]:
    remarks = {}
    for patch in rows:
        try:
            check(patch)
        except UnexpectedTarget as error:
            remarks[patch.name] = str(error)
    return remarks
