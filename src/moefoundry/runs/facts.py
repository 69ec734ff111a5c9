"""State of a run, from its files alone. Whatever is damaged there is a sentence in :attr:`RunFacts.problems`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from moefoundry.checkpoint.lease import LEASE_FILE, observed
from moefoundry.checkpoint.store import CHECKPOINTS, CheckpointStore
from moefoundry.config import UserError, redacted
from moefoundry.runs import history, metrics

CONFIG_FILE = "config.yaml"
SIGNS = (metrics.FILE_NAME, history.FILE_NAME, LEASE_FILE, CHECKPOINTS)  # of a directory that is a run's
MAX_DEPTH = 4  # of runs below the directory that is searched
MAX_NESTING = 100  # of a recipe: libyaml's loader ends the process where it is far deeper
MAX_KEYS = 20_000  # of a recipe: aliases of YAML could make it larger without end

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a run's own copy is strict already


class RunState(StrEnum):
    """States of a run.

    A ``stale`` one holds its lease and gives no sign of life, or has begun and never said that it ended: it was killed.
    A ``stopped`` one has more to train.
    """

    running = "running"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"
    stale = "stale"
    unknown = "unknown"


@dataclass
class RunFacts:
    """Facts of one run.

    Attributes:
        path: Its directory.
        state: Its state.
        reason: Sentence on a failed, stopped or stale one; may be empty.
        recipe: Values by dotted keys, without secrets; empty where ``config.yaml`` cannot be read.
        last: Last line of its metrics.
        held_out: Held-out losses by batch, nats a token.
        checkpoints: Batches that have a checkpoint.
        seconds: Time in training; None for runs of earlier releases.
        updated: Time of its last batch, or last other sign, in seconds since the epoch.
        events: Its history.
        problems: Sentence on each file that cannot be read, or of which lines are damaged.
    """

    path: Path
    state: RunState = RunState.unknown
    reason: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    last: metrics.Line = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    seconds: float | None = None
    updated: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.recipe.get("run_name") or self.path.name)

    @property
    def batch(self) -> int:
        return int(self.last.get("batch", 0))

    @property
    def max_duration(self) -> str:
        return str(self.recipe.get("max_duration", ""))

    @property
    def max_batches(self) -> int | None:
        """Batches of the whole run; None where its length is in another unit."""
        number = self.max_duration.removesuffix("ba")
        return int(number) if number.isdecimal() and number != self.max_duration else None

    @property
    def progress(self) -> str:
        """Batches so far and the length of the run, for people."""
        whole = self.max_batches
        return f"{self.batch}/{whole}" if whole is not None else f"{self.batch} of {self.max_duration or '?'}"

    def number(self, key: str) -> float | None:
        """Give a metric of the last batch."""
        value = self.last.get(key)
        return float(value) if isinstance(value, (int, float)) else None


def is_run(directory: Path) -> bool:
    """Check whether a directory is a run's: it has one of the files of a run, or a recipe with a ``run_name``."""
    if any((directory / name).exists() for name in SIGNS):
        return True
    try:
        return b"run_name:" in (directory / CONFIG_FILE).read_bytes()
    except OSError:
        return False


def find_runs(root: Path) -> list[Path]:
    """List the runs at and below a directory, by path.

    Raises:
        UserError: There is no such directory.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    return sorted(_runs_below(root, MAX_DEPTH))


def _runs_below(directory: Path, depth: int) -> Iterator[Path]:
    if is_run(directory):
        yield directory
    elif depth:
        try:
            below = [Path(entry) for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != "."]
        except OSError:  # not ours to read
            return
        for child in below:
            yield from _runs_below(child, depth - 1)


def existing_run(path: Path) -> Path:
    """Return the path of a run.

    Raises:
        UserError: There is none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    if not is_run(path):
        raise UserError(f"{path}: no run: it has neither {CONFIG_FILE} nor {', '.join(SIGNS)}")
    return path


def read_facts(run_dir: Path) -> RunFacts:
    """Read what a table needs of a run; nothing is written, and no damage is an error."""
    events, damaged = history.read_lines(run_dir)
    facts = RunFacts(run_dir, events=events, problems=metrics.passed_over(history.FILE_NAME, damaged))
    facts.recipe = _guarded(facts, CONFIG_FILE, {}, lambda: read_config(run_dir / CONFIG_FILE))
    if (file := run_dir / metrics.FILE_NAME).exists():
        line = _guarded(facts, metrics.FILE_NAME, None, lambda: metrics.last_line(run_dir))
        facts.last = line or {}
        facts.held_out, damaged = _guarded(facts, metrics.FILE_NAME, ({}, []), lambda: metrics.scan(run_dir))
        if line is None and file.stat().st_size:
            facts.problems.append(f"{metrics.FILE_NAME}: no whole line")
        else:
            facts.problems += metrics.passed_over(metrics.FILE_NAME, damaged)
    facts.checkpoints = _guarded(facts, CHECKPOINTS, [], CheckpointStore(run_dir / CHECKPOINTS).batches)
    files = [run_dir / name for name in (metrics.FILE_NAME, history.FILE_NAME, CONFIG_FILE)]
    facts.updated = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    facts.seconds = history.seconds_in_training(facts.events, facts.updated)
    facts.state, facts.reason = _state(facts)
    return facts


def add_lines(facts: RunFacts, lines: Sequence[metrics.Line]) -> None:
    """Bring facts up to date with lines that are new, and with all other files, which are short."""
    for line in lines:
        facts.last = line
        if isinstance(loss := line.get(metrics.EVAL_KEY), (int, float)):
            facts.held_out[line["batch"]] = float(loss)
    if lines:
        facts.updated = (facts.path / metrics.FILE_NAME).stat().st_mtime
    facts.checkpoints = CheckpointStore(facts.path / CHECKPOINTS).batches()
    facts.events = history.read_history(facts.path)
    facts.seconds = history.seconds_in_training(facts.events, facts.updated)
    facts.state, facts.reason = _state(facts)


def _guarded(facts: RunFacts, name: str, otherwise: Any, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        text = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        facts.problems.append(f"{name}: {text or type(error).__name__}")
        return otherwise


def _state(facts: RunFacts) -> tuple[RunState, str]:
    lease = observed(facts.path)
    last = facts.events[-1] if facts.events else {}
    if lease is not None and lease.alive and not (last.get("event") == "end" and history.is_after(last, lease.since)):
        return RunState.running, lease.text
    if lease is not None and last.get("event") != "end":
        return RunState.stale, f"no sign of life of {lease.text}; it was killed, or its host is gone"
    if last.get("event") == "end" and last.get("state") in list(RunState):
        return RunState(last["state"]), str(last.get("reason", ""))
    if last.get("event") == "start":
        return RunState.stale, f"begun at {last['at']}, and no end is noted"
    if facts.max_batches is not None and facts.batch >= facts.max_batches:
        return RunState.finished, ""
    if not facts.last:
        return RunState.unknown, "no batch has ended"
    return RunState.stopped, ""


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml`` as values by dotted keys, without secrets; lists are values.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no mapping, is nested too deeply, or has too many keys.
        YAMLError: It is no YAML.
    """
    text = path.read_text()
    _check_nesting(text)
    tree = yaml.load(text, Loader=Loader)  # a safe loader
    if not isinstance(tree, dict):
        raise ValueError("no mapping")
    flat: dict[str, Any] = {}
    rest: list[tuple[str, Any]] = [("", tree)]
    while rest:
        above, value = rest.pop()
        if isinstance(value, dict) and (value or not above):
            rest += [(f"{above}.{name}" if above else str(name), child) for name, child in reversed(value.items())]
        else:
            flat[above] = redacted(_plain(value), above)
        if len(flat) + len(rest) > MAX_KEYS:
            raise ValueError("too many keys")
    return flat


def _check_nesting(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            raise ValueError("nested too deeply")


def _plain(value: Any) -> Any:
    """Turn what YAML has and recipes have not, such as dates and sets, into text and lists."""
    if isinstance(value, dict):
        return {str(name): _plain(child) for name, child in value.items()}
    if isinstance(value, (list, set, tuple)):
        return [_plain(child) for child in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
