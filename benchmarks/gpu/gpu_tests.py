"""The project's tests that need a GPU: which pass, and the assertion of each that does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.figures import Figures, NotRunError, Part
from benchmarks.gpu.steps import Options

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
WORKERS = max(1, min(14, (os.cpu_count() or 2) - 2))
"""Processes; most of their time goes into compiling kernels."""
SECONDS, LAST = 100.0, 15.0
"""Until pytest is interrupted, and how long it may then take to report; together less than the step has."""
OF_COMPOSER = ("tests/callbacks",)
"""Folders whose tests import Composer."""


def run(figures: Figures, options: Options) -> None:
    """Run them, those that need Composer apart."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text()]
    of_composer = [file for file in files if file.startswith(OF_COMPOSER)]
    figures.run("without Composer", pytest, [file for file in files if file not in of_composer])
    figures.run("with Composer", with_composer, of_composer)


def with_composer(part: Part, files: list[str]) -> None:
    """Those that import Composer, where it is installed."""
    if find_spec("composer") is None:
        raise NotRunError(f"composer is not installed ({', '.join(files)})")
    pytest(part, files)


def pytest(part: Part, files: list[str]) -> None:
    """Run the GPU tests of some files."""
    if not files:
        raise NotRunError("no such tests")
    parallel = ["-n", str(WORKERS)] if find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", *parallel, "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *files]
        code, output = run_for(command, SECONDS)
        part.put(files=files, exit_code=code, last_line=(output.splitlines() or [""])[-1])
        if report.exists():
            part.put(**summary(report))
        else:
            part.put(**outcomes(output))
            raise RuntimeError(f"pytest wrote no report: {output[-2000:]}")


def run_for(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status and output of a pytest; after ``seconds`` it is interrupted, and reports what has run."""
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(LAST)
            except subprocess.TimeoutExpired:  # a worker waits for a kernel that does not end
                process.kill()
                process.wait()
        output.seek(0)
        return process.returncode, output.read()


def outcomes(output: str) -> dict[str, object]:
    """Counts and failures by the lines that ``pytest -v`` prints, where it ended before it reported."""
    found = re.findall(
        r"(PASSED|FAILED|ERROR|SKIPPED)\b.*? (tests/\S+)|(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)", output
    )
    state_of = {(one or other): (before or after) for before, one, other, after in found}
    failed = {name: state for name, state in state_of.items() if state in ("FAILED", "ERROR")}
    return {"tests": len(state_of), "failures": len(failed), "failed": failed}


def summary(report: Path) -> dict[str, object]:
    """Counts, seconds, failures with their assertion lines and reasons of skips of a JUnit report."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    failures, skips = {}, {}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failures[name] = assertion(found.text or found.get("message") or kind)
        if (skipped := case.find("skipped")) is not None:
            reason = skipped.get("message") or "skipped"
            skips[reason] = skips.get(reason, 0) + 1
    counts = {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}
    return counts | {"seconds": float(suite.get("time", 0)), "failed": failures, "skips": skips}


def assertion(text: str) -> str:
    """The lines that pytest marks with E, the first few."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return " | ".join(marked[:4])[:500] or text.strip().splitlines()[-1][:500]
