"""One rank's work for all, and errors of one rank raised on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from moefoundry.config import UserError


def rank() -> int:
    """Return the number of this rank; 0 in a plain process."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """Call ``action`` on rank 0 and give its result to every rank, so that the store is asked once. A collective.

    Raises:
        UserError: Rank 0 raised it; raised on every rank.
    """
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_every_rank(value: Any) -> list[Any]:
    """Gather a small object of every rank, by rank. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(what: str = "") -> Iterator[None]:
    """Raise on every rank what the block raises on any: an error of the lowest such rank. A collective at its end.

    Args:
        what: Begins the message; empty for the message alone.

    Raises:
        UserError: In place of the error.
    """
    cause: Exception | None = None
    message: str | None = None
    try:
        yield
    except Exception as error:
        cause, message = error, f"{what}: {describe(error)}" if what else describe(error)
    first = next((each for each in from_every_rank(message) if each is not None), None)
    if first is not None:
        raise UserError(first) from cause


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Begin the message of any error of the block with ``what``.

    Raises:
        UserError: In place of the error.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Put an error in one line; for an error of a file, the file first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
