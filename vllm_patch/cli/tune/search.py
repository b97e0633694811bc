# SPDX-License-Identifier: Apache-2.0
"""What is tried after what, and what is taken."""

import math
import sys
from collections.abc import Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass, replace

from tqdm import tqdm

from vllm_patch.cli import UsageError
from vllm_patch.cli.tune import candidates
from vllm_patch.cli.tune.ahead import Compilers
from vllm_patch.cli.tune.candidates import Path
from vllm_patch.cli.tune.experts import Batch, Layer, present
from vllm_patch.fp8_tp_padding.kernels.tiles import Tiles

# While candidates are compared, and of them the fastest with the present tiles.
FEW_REPLAYS, REPLAYS = 10, 40
# What is gained has to be more than this, and than the present tiles differ from
# themselves.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Option:
    """Tiles that may be taken for a number of tokens.

    Attributes:
        tiles: They.
        before: Microseconds of the present ones.
        after: Microseconds of these.
        cost: What they are chosen by; without a gain no less than the present ones'.

    """

    tiles: Tiles
    before: float
    after: float
    cost: float

    @property
    def is_gain(self) -> bool:
        return self.cost < self.before


def tune(
    layer: Layer, tokens: Iterable[int], kept: Iterable[int], compilers: Compilers
) -> dict[int, Option]:
    """Return what is best, by number of tokens, fewest first.

    Args:
        layer: The experts.
        tokens: Numbers of tokens to tune.
        kept: Others, which keep their tiles, and cost nothing.
        compilers: Compile what is tried.

    Raises:
        UsageError: What is tuned does not fit what is kept.

    """
    batches = {number: Batch(layer, number) for number in sorted(tokens)}
    found = _descend(batches.values(), compilers)
    options = {n: _options(batch, found[n]) for n, batch in batches.items()}
    for number in {*kept} - {*options}:
        options[number] = [Option(present(layer.case, number), 1.0, 1.0, 1.0)]
    options = dict(sorted(options.items()))
    return dict(zip(options, in_order([*options.values()]), strict=True))


def _descend(batches: Iterable[Batch], compilers: Compilers) -> dict[int, list[Tiles]]:
    """Return the best tiles of each path, by number of tokens."""
    paths: list[tuple[Batch, Path]] = []
    for batch in batches:
        starts = [*candidates.starts(batch.problem, batch.layer.gpu), batch.present]
        of_each = {(tiles.block_m, tiles.group_m): tiles for tiles in starts}
        paths += [(batch, batch.path(tiles)) for tiles in of_each.values()]
    for number, (name, choices) in enumerate(candidates.STEPS.items(), 1):
        tried = [[path.tiles, *choices(path)] for _, path in paths]
        calls = [
            (path.problem, tiles)
            for (_, path), each in zip(paths, tried, strict=True)
            for tiles in each
        ]
        what = f"{number}/{len(candidates.STEPS)} {name}"
        _wait(compilers.compile(calls), f"{what}, compiling")
        bar = tqdm(total=len(calls), desc=f"{what}, timing", disable=None)
        with bar:
            for index, (batch, path) in enumerate(paths):
                each = [*dict.fromkeys(tried[index])]
                paths[index] = batch, _fastest(batch, path, each)
                bar.update(len(tried[index]))
    found: dict[int, list[Tiles]] = {}
    for batch, path in paths:
        if path.time < math.inf:
            found.setdefault(batch.problem.num_tokens, []).append(path.tiles)
    return found


def _wait(begun: Sequence[futures.Future], what: str) -> None:
    done = futures.as_completed(begun)
    for future in tqdm(done, what, total=len(begun), disable=None):
        future.result()


def _fastest(batch: Batch, path: Path, tried: list[Tiles]) -> Path:
    """Return the path with the fastest tiles that compute what the present ones do."""
    times = {tiles: batch.time(tiles, FEW_REPLAYS) for tiles in tried}
    for tiles in sorted(times, key=times.get):
        if times[tiles] == math.inf:
            break
        if (difference := batch.difference(tiles)) is None:
            return replace(path, tiles=tiles, time=times[tiles])
        tqdm.write(
            f"left out, for {batch.problem.num_tokens} tokens: {difference}, of the "
            f"output of present tiles: {tiles}",
            file=sys.stderr,
        )
    return replace(path, time=math.inf)


def _options(batch: Batch, found: Iterable[Tiles]) -> list[Option]:
    """Return the present tiles and others, timed in turns."""
    hidden, present = batch.problem.hidden, batch.present
    others = dict.fromkeys(tiles.fit(hidden) for tiles in found)
    others.pop(present, None)
    first, second, *times = batch.times([present, present, *others], REPLAYS)
    before = min(first, second)
    enough = before * (1 - LEAST_GAIN) - abs(first - second)
    options = [Option(present, before, before, before)]
    for tiles, time in zip(others, times, strict=True):
        # Where the order of options decides, present tiles go first.
        cost = time if time < enough else max(time, before * (1 + LEAST_GAIN))
        options.append(Option(tiles, before, time, cost))
    return options


def in_order(options: Sequence[Sequence[Option]]) -> list[Option]:
    """Return one for each number of tokens, of the least product of costs.

    Blocks of pairs never get smaller as tokens grow: the workspace for the most tokens
    has to do for all.

    Args:
        options: Of each number of tokens, fewest first.

    Raises:
        UsageError: No choice is in order.

    """
    best: dict[int, tuple[float, list[Option]]] = {0: (0.0, [])}
    for several in options:
        following: dict[int, tuple[float, list[Option]]] = {}
        for option in several:
            group_m = option.tiles.group_m
            before = [each for least, each in best.items() if least <= group_m]
            if not before:
                continue
            cost, chosen = min(before, key=lambda each: each[0])
            cost += math.log(option.cost)
            if group_m not in following or cost < following[group_m][0]:
                following[group_m] = cost, [*chosen, option]
        best = following
    if not best:
        raise UsageError(
            "what was found does not fit the tiles of other numbers of tokens, whose "
            "blocks get smaller as tokens grow. Leave out --tokens."
        )
    return min(best.values(), key=lambda each: each[0])[1]
