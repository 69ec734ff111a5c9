"""Read ``metrics.jsonl``: whole, its end alone, or as it grows. ``callbacks/metrics_file.py`` writes it.

Lines are long where there are many experts, so a file may have gigabytes: what asks for a few values reads no more than
it must, and what reads all of it keeps one line at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
EVAL_KEY = "metrics/eval/LanguageCrossEntropy"
LOSS_KEY = "loss/train/lm"
SPEED_KEY = "throughput/tokens_per_sec"
LOAD_PREFIX = "moe/load/"
TASK_METRIC = re.compile(r"metrics/[^/]+/\d+-shot/.+|icl/metrics/.+")
END_BYTES = 4 * 2**20  # in which the last whole line is looked for

_EVAL = f'"{EVAL_KEY}": '.encode()
_EVALUATED = re.compile(re.escape(_EVAL) + rb"([-+.\w]+)")
_BATCH = re.compile(rb'\{"batch": (\d+)')

Line = dict[str, Any]


def parse_line(text: bytes | str) -> Line | None:
    """Read one line; None if it is torn or something else. Values that are not what a metric is are left out."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("batch")) is not int:
        return None
    measured = {name: value for name, value in line.items() if _is_measured(name, value)}
    return measured if "batch" in measured else None


def _is_measured(name: str, value: Any) -> bool:
    if name.startswith(LOAD_PREFIX):
        return isinstance(value, list) and bool(value) and {*map(type, value)} <= {int, float}
    return type(value) is float or (type(value) is int and value.bit_length() < 64)


def read_lines(run_dir: Path) -> Iterator[Line]:
    """Yield the lines of a run as they were written, without torn ones; one at a time is in memory."""
    with (run_dir / FILE_NAME).open("rb") as file:
        for text in file:
            if (line := parse_line(text)) is not None:
                yield line


def read_metrics(run_dir: Path) -> list[Line]:
    """Read all lines in batch order, the last of each batch; a torn last line is left out."""
    lines = {line["batch"]: line for line in read_lines(run_dir)}
    return [lines[batch] for batch in sorted(lines)]


def last_line(run_dir: Path) -> Line | None:
    """Read the last whole line; None if there is none."""
    with (run_dir / FILE_NAME).open("rb") as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(max(0, size - END_BYTES))
        texts = file.read().splitlines()
    return next((line for text in reversed(texts) if (line := parse_line(text)) is not None), None)


def scan(run_dir: Path) -> tuple[dict[int, float], list[int]]:
    """Find the held-out losses of a run by batch, and its damaged lines, without parsing the rest.

    Returns:
        The losses, and the numbers, from 1 on, of the lines that do not begin and end as lines do. The last line is not
        among them where its end is missing: it is being written, or was when the run was killed.
    """
    losses: dict[int, float] = {}
    damaged: list[int] = []
    with (run_dir / FILE_NAME).open("rb") as file:
        for number, line in enumerate(file, 1):
            batch = _BATCH.match(line)
            if batch is None or not line.endswith(b"}\n"):
                if line.endswith(b"\n"):
                    damaged.append(number)
            elif _EVAL in line and (found := _EVALUATED.search(line)):
                losses[int(batch[1])] = float(found[1])
    return losses, damaged


def passed_over(name: str, numbers: Sequence[int]) -> list[str]:
    """Say which lines of a file are damaged; nothing where none is."""
    if not numbers:
        return []
    first = f"line {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} lines, the first is line {numbers[0]}"
    return [f"{name}: damaged, and passed over: {first}"]


def task_scores(metrics: list[Line]) -> dict[str, list[tuple[int, float]]]:
    """Collect metrics of tasks and averages of them, by name without prefix: batches and values."""
    scores: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if TASK_METRIC.fullmatch(name):
                scores.setdefault(name.removeprefix("icl/").removeprefix("metrics/"), []).append((line["batch"], value))
    return scores


class Follower:
    """Reads the lines that have come since the last look; at the first one, those in the last :data:`END_BYTES`.

    Args:
        run_dir: Directory of the run; the file need not be there yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        self._offset = 0
        self._inode = 0

    def new_lines(self) -> list[Line]:
        """Read whole lines that are new; those at its end where a resumed run has replaced the file."""
        try:
            file = self.path.open("rb")
        except OSError:  # what is wrong with the file is among the problems of the run
            return []
        with file:
            size, inode = file.seek(0, 2), file.fileno() and self.path.stat().st_ino
            if inode != self._inode or size < self._offset:
                self._offset, self._inode = max(0, size - END_BYTES), inode
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for text in whole.splitlines() if (line := parse_line(text)) is not None]
