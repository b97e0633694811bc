"""What the masked path has to reach, and whether it did."""

import statistics
from dataclasses import dataclass

# Microseconds by column, for each number of tokens.
Table = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Bar:
    """A limit, the worst value seen, and where that was."""

    text: str
    value: float
    limit: float
    at_least: bool
    where: str = ""

    @property
    def is_met(self) -> bool:
        if self.at_least:
            return self.value >= self.limit
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "PASS" if self.is_met else "MISS"
        sign = ">=" if self.at_least else "<="
        where = f" ({self.where})" if self.where else ""
        return f"{verdict} {self.text}: {self.value:.2f} {sign} {self.limit:g}{where}"


def no_regression(table: Table) -> list[Bar]:
    """Return the bars of every case."""
    return [
        *_speed_up(table, "padded", at_every=1.0),
        *_speed_up(table, "refined", at_every=1.0),
    ]


def main_case(table: Table) -> list[Bar]:
    """Return the bars of Qwen3-235B at TP 8 on an H200."""
    return [
        *_speed_up(table, "refined", at_every=1.2, mean=1.5),
        *_speed_up(table, "padded", at_every=1.0, mean=1.25),
        *_times_floor(table, first=16, last=256, limit=1.4),
        *_latency(table, tokens=1, limit=18),
        *_latency(table, tokens=4096, limit=560),
    ]


def ratios(table: Table, above: str, below: str) -> dict[int, float]:
    """Return ``above / below`` where both were measured."""
    return {
        tokens: row[above] / row[below]
        for tokens, row in table.items()
        if above in row and below in row
    }


def _speed_up(table: Table, other: str, at_every: float, mean: float | None = None):
    found = ratios(table, other, "ours")
    if not found:
        return
    tokens = min(found, key=found.get)
    text = f"{other} / ours"
    where = f"{tokens} tokens"
    yield Bar(f"{text}, at worst", found[tokens], at_every, True, where)
    if mean is not None:
        average = statistics.geometric_mean(found.values())
        where = f"{len(found)} numbers of tokens"
        yield Bar(f"{text}, geometric mean", average, mean, True, where)


def _times_floor(table: Table, first: int, last: int, limit: float):
    found = ratios(table, "ours", "floor")
    found = {tokens: r for tokens, r in found.items() if first <= tokens <= last}
    if found:
        tokens = max(found, key=found.get)
        text = f"ours / floor, {first} to {last} tokens"
        yield Bar(text, found[tokens], limit, False, f"{tokens} tokens")


def _latency(table: Table, tokens: int, limit: float):
    if "ours" in table.get(tokens, {}):
        text = f"us at {tokens} token{'s' * (tokens > 1)}"
        yield Bar(text, table[tokens]["ours"], limit, False)
