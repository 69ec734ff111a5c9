"""Stores for mosaicml-streaming beside its own: importing this module adds all of fsspec's."""

from __future__ import annotations

import os

import fsspec  # type: ignore[import-untyped]
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader


class FsspecDownloader(CloudDownloader):
    """Download from every URL that fsspec reads."""

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
