"""A prepared corpus in an object store: uploaded from a local directory, its ``corpus.json`` last."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moefoundry.config.errors import UserError
from moefoundry.data.progress import Progress
from moefoundry.data.stores import PROBE, Remote
from moefoundry.data.summary import CORPUS_FILE, CorpusSummary, read_corpus_summary

TRANSFERS = 4
DIRECTORIES = ("train/", "val/", "tokenizer/")
OWN = (*DIRECTORIES, PROBE)


class StoredCorpus:
    """Place of a corpus in a store.

    Args:
        url: URL of its directory.

    Raises:
        UserError: The store cannot be read, or something else is at the place.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._remote = Remote(url)
        self._remote.try_reading()
        self.names = frozenset(self._remote.names())
        foreign = [name for name in self.names if not name.startswith(OWN)]
        if foreign and CORPUS_FILE not in self.names:  # what an upload has left that was ended is no hindrance
            raise UserError(f"{url}: holds {min(foreign)} and is no prepared corpus; choose another OUT")

    @property
    def local(self) -> Path:
        """Directory of this machine in which the corpus is prepared; the same for every attempt."""
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"moefoundry-prepare-{name}", "corpus")

    def summary(self) -> CorpusSummary | None:
        """Read the summary of the corpus that is there; None if there is none."""
        if CORPUS_FILE not in self.names:
            return None
        with tempfile.TemporaryDirectory() as directory:
            self._remote.download(CORPUS_FILE, Path(directory, CORPUS_FILE))
            replaced = not Path(directory, CORPUS_FILE).stat().st_size  # by an upload that was ended
            return None if replaced else read_corpus_summary(directory)

    def upload(self, directory: Path) -> None:
        """Upload a corpus. No reader takes it for complete before it is, nor what it replaces from now on.

        Raises:
            UserError: The store fails for good.
        """
        self._remote.try_writing()
        files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
        last = files.pop(CORPUS_FILE)
        if CORPUS_FILE in self.names:
            self._remote.upload_bytes(b"", CORPUS_FILE)
        with Progress("uploading", sum(path.stat().st_size for path in files.values())) as progress:

            def one(name: str) -> int:
                self._remote.upload(files[name], name)
                return files[name].stat().st_size

            with ThreadPoolExecutor(TRANSFERS) as pool:
                for size in pool.map(one, files):
                    progress.update(0, size)
                stale = {name for name in self.names if name.startswith(DIRECTORIES)} - files.keys()
                list(pool.map(self._remote.discard, sorted(stale)))
        self._remote.upload(last, CORPUS_FILE)
