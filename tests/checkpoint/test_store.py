"""Which checkpoints exist: complete ones only, under names that are never written to again."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from moefoundry.checkpoint.manifest import COMMIT_FILE, STATE_FILE, Origin, commit
from moefoundry.checkpoint.store import CheckpointStore, Retention, entries, find_checkpoint, remove
from moefoundry.cli.main import main
from moefoundry.config import UserError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def save(store: CheckpointStore, batch: int) -> Path:
    commit(store.begin(batch), Origin(batch), {})
    return store.publish(batch)


def test_an_absent_directory_is_an_empty_store(store: CheckpointStore) -> None:
    assert store.batches() == store.claimed() == []
    assert store.latest() is None


def test_the_newest_is_by_number(store: CheckpointStore) -> None:
    for batch in (9, 100, 20):
        save(store, batch)
    assert store.batches() == [9, 20, 100]
    assert store.latest() == store.path(100)


def test_row6_only_committed_checkpoints_count(store: CheckpointStore) -> None:
    save(store, 4)
    (save(store, 8) / COMMIT_FILE).unlink()
    (store.begin(6) / STATE_FILE).write_text("{}")  # never published
    (store.root / "ba10.bak").mkdir()
    (store.root / "notes.txt").write_text("")
    assert store.batches() == [4]
    assert store.claimed() == [4, 8]
    (store.path(8) / STATE_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"ba8/COMMITTED: not a committed checkpoint"):
        find_checkpoint(str(store.path(8)))


def test_what_interrupted_saves_left_is_removed(store: CheckpointStore) -> None:
    (store.begin(6) / "half").write_text("")
    assert list(store.begin(8).iterdir()) == []
    assert entries(store.root) == [store.staging_path(8)]


def test_an_unfinished_save_cannot_be_published(store: CheckpointStore) -> None:
    store.begin(4)
    with pytest.raises(ValueError, match=r"ba4\.incomplete is not committed"):
        store.publish(4)
    store.discard(4)
    assert entries(store.root) == []


def test_row7_a_published_checkpoint_is_never_overwritten(store: CheckpointStore) -> None:
    path = save(store, 4)
    (path / "shard").write_text("first")
    with pytest.raises(UserError, match=r"ba4 exists already; a published checkpoint is never overwritten"):
        store.begin(4)
    commit(store.begin(6), Origin(6), {})
    store.staging_path(6).rename(store.staging_path(4))
    with pytest.raises(UserError, match=r"ba4 exists already; a published checkpoint is never overwritten"):
        store.publish(4)
    assert (path / "shard").read_text() == "first"


def test_row7_what_is_damaged_gets_out_of_the_way(store: CheckpointStore) -> None:
    (save(store, 4) / COMMIT_FILE).unlink()
    save(store, 4)  # moves it by itself: it does not count as a checkpoint
    assert store.quarantine(4).name == "ba4.quarantine-1"
    save(store, 4)
    save(store, 30)
    assert [path.name for path in entries(store.root)] == ["ba4", "ba4.quarantine-0", "ba4.quarantine-1", "ba30"]
    assert store.batches() == [4, 30]


@pytest.mark.parametrize(
    ("delete", "left"),
    [
        (lambda store: store.retain(Retention(1)), "ba2.incomplete"),
        (lambda store: main(["checkpoint", "delete", str(store.path(2)), "--yes"]), "ba2.incomplete"),
        (lambda store: remove(store.quarantine(2)), "ba2.quarantine-0.incomplete"),
    ],
    ids=["retention", "command", "quarantined"],
)
def test_a_deletion_that_is_killed_is_ended_by_the_next_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, delete: Callable[[CheckpointStore], object], left: str
) -> None:
    for batch in (2, 4):
        (save(store, batch) / STATE_FILE).write_text("{}")

    def dies(path: Path) -> None:
        (path / STATE_FILE).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):  # the command gives back a status
        patch.setattr("shutil.rmtree", dies)
        delete(store)
    assert [path.name for path in entries(store.root)] == [left, "ba4"]
    assert store.claimed() == [4], "what is left is no checkpoint, nor a damaged one"
    save(store, 2)
    assert [path.name for path in entries(store.root)] == ["ba2", "ba4"]


def test_one_that_another_process_deletes_too_is_gone(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may begin a save while a person deletes a checkpoint."""
    save(store, 2)
    store.begin(4)
    rmtree, times = shutil.rmtree, []

    def surprised(path: Path) -> None:
        times.append(path)
        if len(times) == 1:
            raise FileNotFoundError(path / "gone meanwhile")
        rmtree(path)

    monkeypatch.setattr("shutil.rmtree", surprised)
    remove(store.path(2))
    assert entries(store.root) == [store.staging_path(4)]
    assert times == [store.staging_path(2)] * 2


def test_find_a_checkpoint_by_its_own_its_stores_or_its_runs_directory(store: CheckpointStore) -> None:
    save(store, 4)
    newest = save(store, 6)
    assert find_checkpoint(str(store.path(4))) == store.path(4)
    assert find_checkpoint(str(store.root)) == newest
    assert find_checkpoint(str(store.root.parent)) == newest
    with pytest.raises(UserError, match=r"^load_path: no complete checkpoint at .*/ba5"):
        find_checkpoint(str(store.path(5)), "load_path")
    with pytest.raises(UserError, match=r"^/.*/ba5: no complete checkpoint there$"):
        find_checkpoint(str(store.path(5)))
