"""What a log shows of a preparation that takes long."""

import io
import re
import time
from collections.abc import Callable

import pytest

from moefoundry.data import progress as module
from moefoundry.data.progress import Progress
from moefoundry.data.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.02)
    monkeypatch.setattr(module, "BAR_SECONDS", 0.02)


def wait_for(pattern: str, shown: Callable[[], str]) -> None:
    """Wait until what is shown matches."""
    text, end = "", time.monotonic() + 30
    while not re.search(pattern, text):
        assert time.monotonic() < end, f"{pattern} is not in {text}"
        time.sleep(0.01)
        text += shown()


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        return capsys.readouterr().err

    with Progress("tokenizing", 4_000_000) as progress:
        progress.update(20, 1_000_000)
        wait_for(r"^tokenizing: 25% of 4\.00MB, 20 documents, [\d.]+ MB/s, \d+ s, \d+ s left\n", shown)
    with Progress("reading") as progress:
        wait_for(r"reading: \d+ s\n", shown)
        progress.update(1, 3000)
        wait_for(r"reading: 3\.00kB, 1 documents, [\d.]+ MB/s, \d+ s\n", shown)
    shown()
    monkeypatch.setattr(module, "LINE_SECONDS", 60.0)
    with Progress("quick", 10) as progress:
        progress.update(1, 10)
    assert shown() == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("tokenizing", 4_000_000) as progress:
        progress.update(20, 1_000_000)
        wait_for(r"25%.*MB/s, 20 documents", terminal.getvalue)
    assert "\n" not in terminal.getvalue()


def test_lines_come_while_the_tokenizer_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """The library holds the main thread then, in which nothing could be counted."""
    words = [" ".join(f"{number * 7919 % 100_003:x}" for number in range(part, part + 4000)) for part in range(8)]
    with Progress("learning the tokenizer"):
        train_tokenizer(words, 8000)
    assert "learning the tokenizer: 0 s" in capsys.readouterr().err
