"""A pseudo-terminal to write to, and what a person would see on it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import termios
from dataclasses import dataclass, field

SIZE = (40, 90)  # rows and columns
TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def open_terminal() -> tuple[int, int]:
    """The side that reads what is shown, and the side that a program writes to."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, SIZE)
    return controller, terminal


def environment() -> dict[str, str]:
    """Variables of a program on a terminal, of a person and not of continuous integration."""
    return {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm"}


def shown_by(command: list[str]) -> tuple[str, int]:
    """Run a command on a terminal. Returns what it wrote, and its status."""
    controller, terminal = open_terminal()
    process = subprocess.Popen(command, env=environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = read_all(controller)
    return seen, process.wait(60)


def read_all(controller: int) -> str:
    """Read until every writer has closed its side."""
    seen = b""
    try:
        while chunk := os.read(controller, 4096):
            seen += chunk
    except OSError:  # the other side is closed
        pass
    os.close(controller)
    return seen.decode()


@dataclass
class Screen:
    """The lines of a terminal that is as high as it must be.

    Attributes:
        lines: Text of each line, without colors.
        row: Line of the cursor, from 0 on.
        column: Column of the cursor, from 0 on.
        cursor: True if the cursor is visible.
    """

    lines: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0
    cursor: bool = True

    @classmethod
    def of(cls, text: str) -> Screen:
        screen = cls()
        for numbers, command, control, letters in TOKEN.findall(text):
            if command:
                screen._obey(numbers, command)
            elif control == "\r":
                screen.column = 0
            elif control == "\n":
                screen.column = 0  # as terminals are set, or their other side writes "\r" as well
                screen.row += 1
                screen.lines += [""] * (screen.row + 1 - len(screen.lines))
            else:
                line = screen.lines[screen.row].ljust(screen.column)
                end = screen.column + len(letters)
                screen.lines[screen.row] = line[: screen.column] + letters + line[end:]
                screen.column = end
        return screen

    def _obey(self, numbers: str, command: str) -> None:
        if command == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif command == "K":
            assert numbers == "2", "the whole line"
            self.lines[self.row] = ""
        elif command in "hl" and numbers == "?25":
            self.cursor = command == "h"
        else:
            assert command == "m", (numbers, command)

    def where(self, words: str) -> list[int]:
        """Numbers of the lines that have these words."""
        return [number for number, line in enumerate(self.lines) if words in line]
