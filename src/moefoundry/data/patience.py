"""How long a store may say nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def unless_silent(action: Callable[[], T], progress: Callable[[], int], longest: float) -> T:
    """The result of ``action``, which runs in a thread.

    Args:
        action: What may never return.
        progress: A number that changes while it is alive.
        longest: Seconds that the number may stay the same.

    Raises:
        TimeoutError: It has for longer; the thread is given up.
        Exception: What ``action`` raises.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    before = progress()
    while not wait([outcome], longest).done:
        if (now := progress()) == before:
            raise TimeoutError(f"nothing has come for {longest:g} seconds")
        before = now
    return outcome.result()
