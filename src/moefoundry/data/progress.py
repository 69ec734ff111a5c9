"""Progress of a stage of the preparation: a bar on a terminal, else a line now and then (in a log, behind a pipe)."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0
BAR_SECONDS = 1.0


class Progress:
    """Progress of one stage, in documents and bytes of text; a stage that ends at once prints nothing.

    Args:
        stage: Name of the stage.
        total: Bytes in all; None if not known yet.
    """

    def __init__(self, stage: str, total: int | None = None) -> None:
        self._stage, self._total, self._done, self._documents = stage, total, 0, 0
        self._start = time.monotonic()
        self._bar = tqdm(total=total, desc=stage, unit="B", unit_scale=True, disable=None, leave=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def update(self, documents: int, size: int) -> None:
        """Count ``documents`` and ``size`` bytes more."""
        self._done += size
        self._documents += documents
        self._bar.update(size)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()

    def _show(self) -> None:
        while not self._ended.wait(LINE_SECONDS if self._bar.disable else BAR_SECONDS):
            if self._bar.disable:
                print(self._line(), file=sys.stderr, flush=True)
            else:
                documents = f"{self._documents:,} documents" if self._documents else ""
                self._bar.set_postfix_str(documents)  # and the clock moves where no bytes do

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        parts = []
        if self._total:
            share = min(self._done / self._total, 1.0)
            parts.append(f"{share:.0%} of {tqdm.format_sizeof(self._total, 'B')}")
        elif self._done:
            parts.append(tqdm.format_sizeof(self._done, "B"))
        if self._done:
            parts += [f"{self._documents:,} documents", f"{self._done / seconds / 1e6:.1f} MB/s"]
        parts.append(f"{seconds:.0f} s")
        if self._total and 0 < self._done < self._total:
            parts.append(f"{seconds * (self._total - self._done) / self._done:.0f} s left")
        return f"{self._stage}: {', '.join(parts)}"
