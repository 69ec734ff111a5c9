"""Which checkpoints exist: complete ones only, under names that are never written to again."""

from pathlib import Path

import pytest

from moefoundry.checkpoint.store import STATE_FILE, CheckpointStore, find_checkpoint
from moefoundry.config import UserError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def save(store: CheckpointStore, batch: int) -> Path:
    (store.begin(batch) / STATE_FILE).write_text("{}")
    return store.publish(batch)


def test_an_absent_directory_is_an_empty_store(store: CheckpointStore) -> None:
    assert store.batches() == []
    assert store.latest() is None
    store.retain(2)


def test_the_newest_is_by_number(store: CheckpointStore) -> None:
    for batch in (9, 100, 20):
        save(store, batch)
    assert store.batches() == [9, 20, 100]
    assert store.latest() == store.path(100)


def test_only_complete_checkpoints_count(store: CheckpointStore) -> None:
    save(store, 4)
    (store.begin(6) / STATE_FILE).write_text("{}")  # never published
    store.path(8).mkdir()  # without its state
    (store.root / "ba10.bak").mkdir()
    (store.root / "notes.txt").write_text("")
    assert store.batches() == [4]


def test_what_an_interrupted_save_left_is_removed(store: CheckpointStore) -> None:
    (store.begin(6) / "half").write_text("")
    assert list(store.begin(6).iterdir()) == []


def test_a_published_checkpoint_is_never_overwritten(store: CheckpointStore) -> None:
    path = save(store, 4)
    (path / "shard").write_text("first")
    store.begin(4)
    with pytest.raises(UserError, match=r"ba4 exists already; a published checkpoint is never overwritten"):
        store.publish(4)
    assert (path / "shard").read_text() == "first"


@pytest.mark.parametrize(("count", "kept"), [(-1, [2, 4, 6]), (0, [6]), (1, [6]), (2, [4, 6]), (5, [2, 4, 6])])
def test_retention(store: CheckpointStore, count: int, kept: list[int]) -> None:
    for batch in (2, 4, 6):
        save(store, batch)
    store.retain(count)
    assert store.batches() == kept


def test_find_a_checkpoint_by_its_own_its_stores_or_its_runs_directory(store: CheckpointStore) -> None:
    save(store, 4)
    newest = save(store, 6)
    assert find_checkpoint(str(store.path(4))) == store.path(4)
    assert find_checkpoint(str(store.root)) == newest
    assert find_checkpoint(str(store.root.parent)) == newest
    with pytest.raises(UserError, match=r"load_path: no complete checkpoint at .*/ba5"):
        find_checkpoint(str(store.path(5)))
