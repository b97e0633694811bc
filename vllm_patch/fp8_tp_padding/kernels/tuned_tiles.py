# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reads tiles that were tuned for a GPU, an expert's columns and how many there are.

They go before the rule. ``vllm-patch tune`` writes them.
"""

import functools
import inspect
import itertools
import json
import os
from pathlib import Path

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

from .fp8_quant import BLOCK
from .tiles import PairTiles, SortedTiles, Tile, Tiles, check_positive

logger = init_logger("vllm.fp8_tp_padding")

# In the plugin's folder; in a vLLM tree, with those of vLLM's own kernels.
CONFIGS = Path(__file__).parent / "configs"
_FOLDERS = (CONFIGS, Path(inspect.getfile(get_config_file_name)).parent / "configs")


@functools.cache
def tuned_tiles(num_experts: int, size: int) -> dict[int, Tiles]:
    """Return tiles by number of tokens, empty if none were tuned.

    As with vLLM's own kernels, a file in ``VLLM_TUNED_CONFIG_FOLDER`` goes first.

    Args:
        num_experts: Experts of the rank.
        size: Its columns of an expert.

    """
    name = config_name(num_experts, size)
    users = envs.VLLM_TUNED_CONFIG_FOLDER
    folders = (Path(users), *_FOLDERS) if users else _FOLDERS
    files = (folder / name for folder in folders)
    # Path.exists would raise for a folder that may not be read.
    file = next((file for file in files if os.path.exists(file)), None)
    if file is None:
        logger.info("No tuned tiles for the masked kernels (%s): using a rule.", name)
        return {}
    try:
        tuned = read_config(file)
    except (OSError, ValueError) as error:
        logger.warning(
            "Tuned tiles for the masked kernels are left out, and a rule is used, "
            "which may be slower: %s",
            error,
        )
        return {}
    logger.info("Tuned tiles for the masked kernels: %s.", file)
    return tuned


def config_name(num_experts: int, size: int) -> str:
    """Return a tuned file's name: as of vLLM's own kernels, for another dtype."""
    return get_config_file_name(num_experts, size, "fp8_w8a8_masked", [BLOCK, BLOCK])


def read_config(path: Path) -> dict[int, Tiles]:
    """Return tiles by number of tokens, fewest first, from a tuned file.

    Raises:
        ValueError: It is no JSON; or there are no entries; or one has fields that tiles
            do not have or lacks some, has values that no kernel takes, or has smaller
            blocks of pairs than one of fewer tokens: the workspace that fits the
            largest call must fit all others.

    """
    try:
        entries = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}. Mend or delete it.") from error
    if not isinstance(entries, dict) or not entries.keys() - {"triton_version"}:
        raise ValueError(f"{path}: no tiles by number of tokens. Mend or delete it.")
    entries.pop("triton_version", None)
    tuned = {}
    for tokens, entry in entries.items():
        try:
            check_positive("tokens", int(tokens))
            tuned[int(tokens)] = _tiles(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {tokens!r} must be a number of tokens and hold the fields of "
                f"PairTiles or SortedTiles, but: {error!r}. Mend or delete the file."
            ) from error
    tuned = dict(sorted(tuned.items()))
    for fewer, more in itertools.pairwise(tuned):
        least, group_m = (tuned[n].group_m for n in (fewer, more))
        if group_m < least:
            raise ValueError(
                f"{path}: pairs come in blocks of {least} for {fewer} tokens and of "
                f"{group_m} for {more} (0: not sorted; twice block_m: specialized). "
                "Blocks must not shrink as tokens grow, since the workspace is as "
                "large as the largest call needs. Mend or delete the file."
            )
    return tuned


def _tiles(entry: dict) -> Tiles:
    """Return what an entry holds; only sorted pairs come in blocks of ``block_m``."""
    fields = dict(entry)
    for name in ("gate_up", "down"):
        fields[name] = Tile(**entry[name])
    return SortedTiles(**fields) if "block_m" in entry else PairTiles(**fields)
