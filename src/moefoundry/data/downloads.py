"""Stores that data come from, beside those that mosaicml-streaming knows; and how long one may say nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

import fsspec  # type: ignore[import-untyped]
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader

T = TypeVar("T")


class FsspecDownloader(CloudDownloader):
    """Downloads from every URL that fsspec reads."""

    @staticmethod
    def _client_identifier() -> str:
        return "fsspec"

    def _validate_remote_path(self, remote: str) -> None:
        pass  # fsspec says what is wrong with it

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        files, path = fsspec.core.url_to_fs(remote)
        partial = f"{local}.tmp"
        files.get_file(path, partial)
        os.rename(partial, local)

    def clean_up(self) -> None:
        pass  # nothing is open between downloads


for scheme in fsspec.available_protocols():
    DOWNLOADER_MAPPINGS.setdefault(scheme, FsspecDownloader)


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
