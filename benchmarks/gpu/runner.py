"""Runs steps in processes of their own, within a time limit for all, and keeps one JSON of everything.

While a step runs, the next one's process imports what it needs and waits for a line on its standard input: a minute of
imports, all steps together, that does not count. A step that is stopped or dies keeps its figures; one that died in a
part is started again for the parts that are left.

A step's figures are in a file of its own until it has ended, and then in the JSON of everything alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import SOURCE
from benchmarks.gpu.fastest import fastest
from benchmarks.gpu.figures import end_running_part, file_of_stacks, parts_ended, parts_of, write_json
from benchmarks.gpu.gpu_tests import ROOT
from benchmarks.gpu.steps import Options, Step
from benchmarks.gpu.table import render

SHORTEST = 8.0
"""Seconds; with less left, no step is begun."""
LAST = 4.0
"""Seconds kept for writing the table."""
POLL_SECONDS = 2.0


class Run:
    """All steps of one command, beside what an earlier command for the same device left of others in the directory.

    Args:
        options: Passed on to the steps.
        limit: Seconds for everything.
    """

    def __init__(self, steps: Sequence[Step], options: Options, limit: float) -> None:
        self.steps, self.options = steps, options
        self.end = time.monotonic() + limit
        self.record: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "limit_seconds": limit,
            "device": options.device,
            "tiny": options.tiny,
        }
        asked = {step.name: {"state": "not run", "reason": "the run ended before it"} for step in steps}
        self.record["steps"] = self._earlier() | asked
        self._waiting: dict[str, subprocess.Popen[bytes]] = {}

    def run(self) -> None:
        """Run every step for which there is time; whatever happens, write the JSON and the table."""
        signal.signal(signal.SIGTERM, _exit)
        for step in self.steps:
            self._remove_files(step)
        try:
            self._prepare(self.steps[0])
            for step, following in zip(self.steps, [*self.steps[1:], None], strict=True):
                self._run_step(step, following)
        finally:
            for process in self._waiting.values():
                stop(process)
            self.write()
            print((self.options.out / "table.md").read_text(), flush=True)

    def write(self) -> None:
        """``gpu.json`` with all figures so far, ``fastest.json`` for the package, and ``table.md``."""
        for step in self.steps:
            if parts := parts_of(self._path(step)):
                self.record["steps"][step.name]["parts"] = parts
        versions = self.record["steps"].get("machine", {}).get("parts", {}).get("versions")
        if versions:
            self.record["versions"] = versions
        write_json(self.options.out / "gpu.json", self.record)
        write_json(self.options.out / "fastest.json", fastest(self.record))
        (self.options.out / "table.md").write_text(render([self.record]))

    def _run_step(self, step: Step, following: Step | None) -> None:
        entry = self.record["steps"][step.name]
        left = self.end - time.monotonic() - LAST
        if left < SHORTEST:
            entry["reason"] = f"no time: {max(left, 0):.0f} of {self.record['limit_seconds']:.0f} s left"
            return
        start = time.monotonic()
        limit = min(step.seconds, left)
        entry.pop("reason", None)
        for attempt in count():
            self._prepare(step)
            process = self._waiting.pop(step.name)
            if attempt == 0 and following is not None:
                self._prepare(following)
            entry.update(state="running", limit_seconds=round(limit, 1), attempts=attempt + 1)
            before = parts_ended(self._path(step))
            code = self._wait(process, start + limit)
            entry["seconds"] = round(time.monotonic() - start, 1)
            if code == 0:
                entry["state"] = "done"
                break
            entry["state"] = "stopped at its limit" if code is None else f"ended with exit code {code}"
            end_running_part(self._path(step), entry["state"] if code is None else f"the step {entry['state']}")
            if code is None or parts_ended(self._path(step)) == before:
                break
        print(f"== {step.name}: {entry['state']}, {entry['seconds']} s", flush=True)
        self.write()
        self._remove_files(step)

    def _prepare(self, step: Step) -> None:
        """Start a step's process; it waits for its line."""
        if step.name in self._waiting:
            return
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", step.name, "--out", str(self.options.out)]
        command += ["--device", self.options.device] + ["--tiny"] * self.options.tiny
        paths = os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])  # for processes of the tests
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
        self._waiting[step.name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, start_new_session=True
        )

    def _wait(self, process: subprocess.Popen[bytes], end: float) -> int | None:
        """Let a process go on and wait for it; its exit code, or None if it had to be stopped."""
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code says so
            process.stdin.write(b"go\n")
            process.stdin.close()
        try:
            while time.monotonic() < end:
                try:
                    return process.wait(max(0.01, min(POLL_SECONDS, end - time.monotonic())))
                except subprocess.TimeoutExpired:
                    self.write()
            return None
        finally:
            stop(process)

    def _earlier(self) -> dict[str, Any]:
        """Steps of an earlier command."""
        path = self.options.out / "gpu.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        same = all(found.get(key) == self.record[key] for key in ("device", "tiny"))
        return found["steps"] if same else {}

    def _path(self, step: Step) -> Path:
        return self.options.out / f"{step.name}.json"

    def _remove_files(self, step: Step) -> None:
        for path in (self._path(step), file_of_stacks(self._path(step))):
            path.unlink(missing_ok=True)


def _exit(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process with everything that it started; one that waits for a device's driver may take its time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST / 2)


def child(step: Step, options: Options) -> None:
    """What a step's process does: import, wait, run."""
    from benchmarks.gpu.figures import Figures

    function = step.load()
    sys.stdin.readline()
    function(Figures(Path(options.out, f"{step.name}.json"), step.part_seconds), options)
