"""Axes of a sweep, read from overrides that give a key several values."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.spec import every_key, find_key

Point = dict[str, str]
"""Text of each swept key."""

MAX_POINTS = 10_000
"""Combinations of a sweep at most: each is a run."""

OWN_KEYS = ("run_name", "run_dir")
"""Keys that a sweep gives each of its runs."""

_NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(\s+log)?(?:\s+(\d+))?")


@dataclass(frozen=True)
class Values:
    """Values of one key, or of several keys that change together.

    Attributes:
        keys: The keys.
        rows: For each value, the text of every key.
    """

    keys: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        log: Even in the logarithm.
        whole: The key takes whole numbers.
        count: Numbers of a grid; None where only a random search can use it.
    """

    key: str
    low: float
    high: float
    log: bool
    whole: bool
    count: int | None

    def at(self, share: float) -> str:
        """Give the number at a share of the way, as text."""
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return str(round(value)) if self.whole else f"{value:.6g}"


Axis = Values | Range


def read_axes(overrides: Sequence[str], zipped: Sequence[str] = ()) -> tuple[list[Axis], list[str]]:
    """Divide overrides into axes, and those that are the same in all runs.

    Args:
        overrides: ``key=a,b,c``, ``key=1e-4..1e-2 log`` or, for a grid, ``key=1e-4..1e-2 log 5``; and ``key=value``.
            A comma within brackets, braces or quotes does not divide.
        zipped: Lists of keys, ``a,b``, that change together, as many values each.

    Raises:
        ConfigError: A key is one that the sweep sets, a range is no range, or keys that change together have different
            numbers of values.
    """
    found: dict[str, Axis] = {}
    same = []
    for override in overrides:
        key, _, text = override.partition("=")
        if key in OWN_KEYS:
            raise ConfigError([Problem(key, "every run of a sweep has its own, below --output", allowed="no override")])
        values = _divided(text)
        if _RANGE.fullmatch(text.strip()):
            found[key] = _range(key, text.strip())
        elif len(values) > 1:
            if repeated := [value for value, times in Counter(values).items() if times > 1]:
                raise ConfigError([Problem(key, f"{repeated[0] or 'an empty value'} stands there twice")])
            found[key] = Values((key,), tuple((value,) for value in values))
        else:
            same.append(override)
    for names in zipped:
        _zip(found, names.split(","))
    return list(found.values()), same


def grid(axes: Sequence[Axis]) -> Iterator[Point]:
    """Yield every combination; the last axis changes fastest.

    Raises:
        ConfigError: A range does not say how many numbers it has; or there are more than :data:`MAX_POINTS`.
    """
    points = [_points(axis) for axis in axes]
    if (count := math.prod(map(len, points))) > MAX_POINTS:
        keys = ", ".join(key for each in points for key in each[0])
        raise ConfigError([Problem(keys, f"{count:,} combinations", f"at most {MAX_POINTS:,}; --random N draws some")])
    yield from map(_merged, product(*points))


def drawn(axes: Sequence[Axis], count: int, seed: int) -> Iterator[Point]:
    """Yield ``count`` combinations at random; those of a smaller count are the first of a larger one."""
    generator = random.Random(seed)  # draws no secrets
    for _ in range(count):
        yield _merged([_draw(axis, generator) for axis in axes])


def _draw(axis: Axis, generator: random.Random) -> Point:
    if isinstance(axis, Range):
        return {axis.key: axis.at(generator.random())}
    return dict(zip(axis.keys, generator.choice(axis.rows), strict=True))


def _points(axis: Axis) -> list[Point]:
    if isinstance(axis, Values):
        return [dict(zip(axis.keys, row, strict=True)) for row in axis.rows]
    if axis.count is None:
        example = f"'{axis.key}={axis.low:g}..{axis.high:g}{' log' * axis.log} 5'"
        raise ConfigError([Problem(axis.key, f"a grid needs a number of values: {example}; or give --random N")])
    shares = [index / max(1, axis.count - 1) for index in range(axis.count)]
    return [{axis.key: text} for text in dict.fromkeys(axis.at(share) for share in shares)]


def _merged(points: Sequence[Point]) -> Point:
    return {key: text for point in points for key, text in point.items()}


def _divided(text: str) -> list[str]:
    """Divide at commas outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _range(key: str, text: str) -> Range:
    match = _RANGE.fullmatch(text)
    assert match is not None  # the caller has looked
    low, high = float(match[1]), float(match[2])
    log, count = match[3] is not None, float(match[4]) if match[4] else None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError([Problem(key, f"{text}: a number is too large")])
    if low >= high:
        raise ConfigError([Problem(key, f"{match[1]}..{match[2]}: the second number must be larger")])
    if log and low <= 0:
        raise ConfigError([Problem(key, f"{text}: a logarithmic range begins above 0")])
    if count is not None and not 0 < count <= MAX_POINTS:
        raise ConfigError([Problem(key, f"{text}: {match[4]} values", f"1 to {MAX_POINTS:,}")])
    spec = find_key(key)
    return Range(key, low, high, log, spec is not None and spec.kind is int, None if count is None else int(count))


def _zip(axes: dict[str, Axis], keys: Sequence[str]) -> None:
    """Join axes into one, in the place of the first."""
    joined = []
    for key in keys:
        axis = axes.get(key)
        if not isinstance(axis, Values) or axis.keys != (key,):
            hint = "" if key in every_key() else ": no key of a recipe"
            raise ConfigError([Problem(f"--zip {','.join(keys)}", f"{key} has no list of values{hint}")])
        joined.append(axis)
    if len({len(axis.rows) for axis in joined}) > 1:
        numbers = ", ".join(f"{axis.keys[0]} {len(axis.rows)}" for axis in joined)
        raise ConfigError([Problem(f"--zip {','.join(keys)}", f"as many values each are needed: {numbers}")])
    rows = tuple(tuple(row[0] for row in rows) for rows in zip(*(axis.rows for axis in joined), strict=True))
    axes[keys[0]] = Values(tuple(keys), rows)
    for key in keys[1:]:
        del axes[key]
