"""What a stretch of code holds at its peak, from the operations themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations returned while the mode was on, at the moment when most were alive.

    Args:
        without: Tensors that do not count.

    Attributes:
        peak: That many; storages on the meta device have none.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.without = {storage_of(tensor)._cdata for tensor in without}
        self.storages: dict[StorageWeakRef, float] = {}
        self.peak = 0
        self._paused = False
        self._largest: dict[StorageWeakRef, float] = {}  # bytes of each that was ever seen
        self._at_most = 0.0  # bytes, as if nothing had ended or shrunk since the last count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            self.note(out)
        return out

    def note(self, out: Any, share: float = 1.0, beside: int = 0) -> None:
        """Count new storages of ``out``, a ``share`` of their bytes; ``beside`` bytes exist for a moment."""
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta and storage_of(leaf)._cdata not in self.without:
                storage = StorageWeakRef(storage_of(leaf))
                if storage not in self.storages:
                    self.storages[storage] = share
                    self._largest[storage] = share * storage_of(leaf).nbytes()
                    self._at_most += self._largest[storage]
        if self._at_most + beside > self.peak:
            self.peak = max(self.peak, self.now() + beside)

    def now(self) -> int:
        """Bytes that are alive; FSDP changes the sizes of storages."""
        self.storages = {storage: share for storage, share in self.storages.items() if not storage.expired()}
        sizes = {storage: share * _nbytes(storage) for storage, share in self.storages.items()}
        self._largest = {storage: max(size, self._largest[storage]) for storage, size in sizes.items()}
        self._at_most = sum(self._largest.values())
        return round(sum(sizes.values()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that operations return in here."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def storage_of(tensor: Tensor) -> UntypedStorage:
    """The storage of a tensor, or of this rank's part of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _nbytes(storage: StorageWeakRef) -> int:
    alive = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    return 0 if alive is None else alive.nbytes()
