"""Time limits for stores that may hang."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def unless_silent(action: Callable[[], T], progress: Callable[[], int], longest: float) -> T:
    """Run ``action`` in a thread and return its result.

    Args:
        action: Call that may never return.
        progress: Returns a number that changes while the action is alive.
        longest: Seconds that the number may stay the same.

    Raises:
        TimeoutError: The number stayed the same for longer; the thread is left alone.
        Exception: Any error of ``action``.
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
