"""What a log shows of a preparation that takes long."""

import io
import time

import pytest

from moefoundry.data import progress as module
from moefoundry.data.progress import Progress
from moefoundry.data.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(module, "BAR_SECONDS", 0.05)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokenizing", 4_000_000) as progress:
        progress.update(1_000_000)
        time.sleep(0.12)
    with Progress("reading") as progress:
        time.sleep(0.07)
        progress.update(3000)
        time.sleep(0.07)
    with Progress("quick", 10) as progress:
        progress.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert "tokenizing: 25% of 4.00MB, 0 s" in lines
    assert "reading: 0 s" in lines
    assert "reading: 3.00kB, 0 s" in lines
    assert not any(line.startswith("quick") for line in lines)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("tokenizing", 4_000_000) as progress:
        progress.update(1_000_000)
        time.sleep(0.12)
    assert "25%" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_lines_come_while_the_tokenizer_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """The library holds the main thread then, in which nothing could be counted."""
    words = [" ".join(f"{number * 7919 % 100_003:x}" for number in range(part, part + 4000)) for part in range(8)]
    with Progress("learning the tokenizer"):
        train_tokenizer(words, 8000)
    assert "learning the tokenizer: 0 s" in capsys.readouterr().err
