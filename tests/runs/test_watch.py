"""``moefoundry watch``: what it shows, as lines and on a terminal, and when it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from moefoundry.checkpoint.lease import held
from moefoundry.cli.main import main
from moefoundry.runs.live import Drawing, bar, can_draw, chunks, view
from moefoundry.runs.watching import Watched
from tests.runs.terminal import Screen, environment, open_terminal, shown_by
from tests.runs.writing import END, START, line_of, write_run


def shown(run_dirs: list[Path], width: int) -> str:
    runs = [Watched(path) for path in run_dirs]
    for run in runs:
        run.look()
    console = Console(file=io.StringIO(), width=width)
    console.print(view(runs, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_view_has_what_one_asks_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", batches=10, history=[START])
    with held(run):
        text = shown([run], 80)
    for expected in ("one running", "batch 10 of 20", "5 s left", "3.5000 at 10", "1,010", "1.5 GiB", "half a bar"):
        assert expected in text, expected
    assert re.search(r"loss +1\.8974 +held out +3\.5000", text)
    assert re.search(r"data wait +0\.003 s a batch +save wait +0\.50 s", text)
    (layer,) = [line for line in text.splitlines() if "layer2" in line]
    assert "█▂▂▂ most 2.80" in layer
    assert "batch 5: held-out loss 4.0000" in text
    assert "begun on 2 ranks" in text


def test_runs_stand_side_by_side_where_they_fit(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    assert any("one" in line and "two" in line for line in shown(runs, 140).splitlines())
    assert not any("one" in line and "two" in line for line in shown(runs, 80).splitlines())


def test_bars() -> None:
    assert [bar(value, 2.0) for value in (0.0, 0.99, 1.0, 2.0, 9.0)] == ["▁", "▄", "▅", "█", "█"]
    assert bar(1.0, 0.0) == "▁"
    assert chunks([1, 2, 3, 4, 5], 3, max) == [2, 4, 5]


def test_runs_that_have_ended_are_said_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", batches=3, history=[START, END | {"state": "failed", "reason": "ValueError: x"}])
    assert main(["watch", str(one), str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "one: batch 15: held-out loss 3.0000 nats/token" in lines
    assert any(line.startswith("one: batch 20/20  loss 1.3416  balance 0.0200") for line in lines)
    assert lines[-1] == "two: failed: ValueError: x"
    assert "one: finished" in lines
    assert main(["watch", str(tmp_path / "absent")]) == 2


def test_a_run_is_followed_from_before_it_has_a_recipe(tmp_path: Path) -> None:
    ready, run = write_run(tmp_path / "ready", batches=2, history=[START]), tmp_path / "run"
    with held(run):
        watched = Watched(run)
        assert watched.look() == []
        assert (watched.running, watched.name, watched.seconds_left()) == (True, "run", None)
        Console(file=io.StringIO()).print(view([watched], 80))
        for path in ready.iterdir():
            (run / path.name).write_bytes(path.read_bytes())
        assert [line["batch"] for line in watched.look()] == [1, 2]
        assert (watched.running, watched.name, watched.facts.problems) == (True, "ready", [])
        assert watched.facts.max_batches == 20


def watching(run: Path, **streams: int) -> subprocess.Popen[bytes]:
    program = "import sys; from moefoundry.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "watch", str(run), "--interval", "0.1"]
    return subprocess.Popen(command, env=environment(), **streams)  # type: ignore[call-overload]


def read_until(controller: int, expected: str, seconds: float = 30) -> str:
    seen, end = b"", time.monotonic() + seconds
    while expected.encode() not in seen and time.monotonic() < end:
        try:
            seen += os.read(controller, 4096)
        except OSError:  # the other side is closed
            break
    return seen.decode(errors="ignore")  # the last letter may be cut


def test_a_terminal_follows_a_run_to_its_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", batches=1, history=[START])
    controller, terminal = open_terminal()
    with held(run):
        process = watching(run, stdout=terminal, stderr=terminal)
        os.close(terminal)
        assert "batch 1 of 20" in read_until(controller, "batch 1 of 20")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line_of(2)) + "\n")
        assert "batch 2 of 20" in read_until(controller, "batch 2 of 20")
        assert process.poll() is None
        with (run / "history.jsonl").open("a") as file:
            file.write(json.dumps(END | {"state": "stopped", "batch": 2, "reason": "by SIGTERM"}) + "\n")
    assert "stopped by SIGTERM" in read_until(controller, "stopped by SIGTERM")
    while read_until(controller, "nothing of this kind", 5):
        pass
    assert process.wait(30) == 0
    os.close(controller)


def test_ctrl_c_ends_the_view_and_leaves_the_run_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", batches=1, history=[START])
    with held(run):
        before = {path: path.read_bytes() for path in run.iterdir()}
        process = watching(run, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"run: batch 1/20  loss 6.0000")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        process.stdout.close()
        assert {path: path.read_bytes() for path in run.iterdir()} == before


DRAWING = """
import logging, os, sys, warnings
from pathlib import Path
from rich.console import Console
from moefoundry.runs.live import Drawing
from moefoundry.runs.watching import Watched

early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())  # to standard error as it is before the view
run = Watched(Path(sys.argv[1]))
with Drawing([run], Console(stderr=True)) as drawing:
    print("printed")
    drawing.draw()
    run.look()
    drawing.draw()
    warnings.warn("a warning")
    early.warning("logged")
    print("long " * 40 + "end", file=sys.stderr)
    drawing.draw()
    if sys.argv[2] == "error":
        raise ValueError("an error")
    if sys.argv[2] != "end":
        os.kill(os.getpid(), int(sys.argv[2]))
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize("end", ["end", "error", str(int(signal.SIGKILL))])
def test_the_view_leaves_a_terminal_in_order(tmp_path: Path, end: str) -> None:
    """All that is printed stands above it once, and whatever comes after it below, also after a kill."""
    run = write_run(tmp_path / "run", batches=3, history=[START, END | {"batch": 3, "state": "failed", "reason": "x"}])
    text, status = shown_by([sys.executable, "-c", DRAWING, str(run), end])
    screen = Screen.of(text)
    assert status == {"end": 0, "error": 1}.get(end, -signal.SIGKILL)
    (view_begins,), (batch,) = screen.where("run failed"), screen.where("batch 3 of 20")
    (view_ends,) = screen.where("╰")
    above = [screen.where(words) for words in ("printed", "a warning", "logged", "end")]
    assert [len(found) for found in above] == [1] * len(above), screen.lines
    assert sorted(above) == above
    assert above[-1][0] < view_begins < batch < view_ends
    assert screen.cursor
    assert screen.column == 0
    assert screen.row > view_ends
    after = {"end": "after", "error": "ValueError: an error"}.get(end)
    assert after is None or screen.where(after)[-1] > view_ends


def test_a_view_is_cut_to_the_height_of_its_terminal(tmp_path: Path) -> None:
    run = Watched(write_run(tmp_path / "run"))
    console = Console(file=io.StringIO(), width=90, height=8, force_terminal=True)
    with Drawing([run], console) as drawing:
        drawing.draw()
    screen = Screen.of(console.file.getvalue())  # type: ignore[attr-defined]
    assert len(screen.where("batch 20 of 20")) == 1
    assert len(screen.lines) == 8 + 1, "and the line that a view ends with"


def test_a_view_is_let_go_where_another_process_writes(tmp_path: Path) -> None:
    run = Watched(write_run(tmp_path / "run"))
    console = Console(file=io.StringIO(), width=90, height=40, force_terminal=True)
    with Drawing([run], console) as drawing:
        console.file.write("another\n")
        drawing.let_go()
        drawing.draw()
        drawing.draw()
    screen = Screen.of(console.file.getvalue())  # type: ignore[attr-defined]
    (first, second), (another,) = screen.where("─ run finished"), screen.where("another")
    assert first < screen.where("╰")[0] < another < second < screen.where("╰")[1]


def test_a_view_is_only_drawn_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = open_terminal()
    with os.fdopen(terminal, "w", encoding="utf-8") as stream, os.fdopen(controller):
        for variable in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert can_draw(Console(file=stream))
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert not can_draw(Console(file=io.StringIO()))
        monkeypatch.setenv("TERM", "dumb")
        assert not can_draw(Console(file=stream))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("CI", "true")
        assert not can_draw(Console(file=stream))
