"""Saves in the background: a snapshot, one at a time, on all ranks or on none."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moefoundry.checkpoint import save as module
from moefoundry.checkpoint.format import Box, TensorSpec
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_KEYS, Origin
from moefoundry.checkpoint.save import Saver, local_shards, plan_save
from moefoundry.checkpoint.store import CheckpointStore, entries
from moefoundry.checkpoint.writer import Shard, write_file
from moefoundry.config import UserError
from tests.checkpoint.forge import verify_directory
from tests.distributed import RankError, run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STATE = dict.fromkeys(STATE_KEYS, 3)
SPEC = TensorSpec((4, 6), torch.float32)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"model/a": torch.randn(40, 50, generator=generator), "model/b": torch.arange(7), "step": torch.tensor(3.0)}


def content(checkpoint: Path) -> dict[str, Tensor]:
    read = {name: torch.empty_like(tensor) for name, tensor in tensors().items()}
    read_into(checkpoint, read)
    return read


def assert_equal(checkpoint: Path, expected: dict[str, Tensor]) -> None:
    for name, tensor in content(checkpoint).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture
def saver(store: CheckpointStore) -> Saver:
    return Saver(store, lambda checkpoint: None)


class Disk:
    """A disk that writes when it is told to."""

    def __init__(self, write: Callable[..., object]) -> None:
        self.ready = threading.Event()
        self.write = write

    def __call__(self, *args: object) -> object:
        assert self.ready.wait(30)
        return self.write(*args)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(module.write_file)
    monkeypatch.setattr(module, "write_file", disk)
    yield disk
    disk.ready.set()


def test_what_is_written_is_what_was_there_when_the_save_began(saver: Saver, disk: Disk) -> None:
    changing = tensors()
    saver.start(2, changing, STATE, Origin(2))
    for tensor in changing.values():
        tensor.zero_()
    assert saver.store.batches() == []
    disk.ready.set()
    saver.finish()
    assert_equal(saver.store.path(2), tensors())
    assert verify_directory(saver.store.path(2)).origin.batch == 2


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu(saver: Saver, disk: Disk) -> None:
    changing = {name: tensor.cuda() for name, tensor in tensors().items()}
    saver.start(2, changing, STATE, Origin(2))
    for tensor in changing.values():
        tensor.zero_()
    assert all(buffer.is_pinned() for buffer in saver._buffers.values())
    disk.ready.set()
    saver.finish()
    assert_equal(saver.store.path(2), tensors())


def test_more_tensors_than_threads_are_copied(saver: Saver, disk: Disk) -> None:
    changing = {f"model/{number}": torch.full((number % 7, 3), float(number)) for number in range(50)}
    saver.start(2, changing, STATE, Origin(2))
    expected = {name: tensor.clone() for name, tensor in changing.items()}
    for tensor in changing.values():
        tensor.zero_()
    disk.ready.set()
    saver.finish()
    read_into(saver.store.path(2), changing)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in changing.items())


def test_one_save_is_in_flight_and_its_buffers_are_used_again(saver: Saver, disk: Disk) -> None:
    saver.start(2, tensors(), STATE, Origin())
    buffers = {name: tensor.data_ptr() for name, tensor in saver._buffers.items()}
    threading.Timer(0.2, disk.ready.set).start()
    start = time.perf_counter()
    doubled = {name: 2 * tensor for name, tensor in tensors().items()}
    saver.start(4, doubled, STATE, Origin())
    assert time.perf_counter() - start > 0.15, "it waited for the first"
    saver.finish()
    assert {name: tensor.data_ptr() for name, tensor in saver._buffers.items()} == buffers
    assert_equal(saver.store.path(2), tensors())
    assert_equal(saver.store.path(4), doubled)


def save_and_finish(saver: Saver, *arguments: Any) -> None:
    saver.start(*arguments)
    saver.finish()


@pytest.mark.parametrize("how", ["start", "save"])
def test_row26_a_full_disk(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, how: str
) -> None:
    saver.save(2, tensors(), STATE, Origin())

    def full(path: Path, values: object) -> None:
        path.write_bytes(b"as much as fits")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", full)
        with pytest.raises(UserError, match=r"ba4 was not saved: .*ba4.*__0_0\.distcp: No space left on device"):
            (save_and_finish if how == "start" else Saver.save)(saver, 4, tensors(), STATE, Origin())
    assert ("warning: checkpoint ba4 was not saved" in capfd.readouterr().err) == (how == "start"), "it is told at once"
    assert [path.name for path in entries(saver.store.root)] == ["ba2"]
    assert_equal(saver.store.path(2), tensors())
    saver.start(4, tensors(), STATE, Origin())
    saver.finish()
    assert saver.store.batches() == [2, 4], "when there is space again"


@pytest.mark.parametrize("values", [10, 2 * 10**6], ids=["when it is closed", "within a tensor"])
def test_row26_a_file_that_does_not_fit_is_removed_and_named(tmp_path: Path, values: int) -> None:
    """``/dev/full`` fails as a full disk does."""
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"):
        write_file(tmp_path / "full", [torch.zeros(values)])
    assert not (tmp_path / "full").is_symlink()


def test_row7_an_existing_step_is_refused(saver: Saver) -> None:
    saver.save(2, tensors(), STATE, Origin())
    for save in (saver.start, saver.save):
        with pytest.raises(UserError, match=r"ba2 exists already; a published checkpoint is never overwritten"):
            save(2, {"model/other": torch.zeros(1)}, STATE, Origin())
    assert_equal(saver.store.path(2), tensors())


def test_closing_lets_a_save_end(saver: Saver, disk: Disk) -> None:
    """When training ends with an error, the checkpoint under way is still worth having."""
    saver.start(2, tensors(), STATE, Origin())
    threading.Timer(0.1, disk.ready.set).start()
    saver.close()
    assert saver.store.batches() == [2]


def die_in_a_save(root: Path) -> None:
    saver = Saver(CheckpointStore(root), lambda checkpoint: None)
    saver.start(2, tensors(), STATE, Origin())
    saver.finish()

    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module.commit_files = die  # type: ignore[assignment]
    saver.start(4, tensors(), STATE, Origin())
    time.sleep(30)


def test_row6_a_rank_that_is_killed_in_a_save_leaves_nothing_that_counts(store: CheckpointStore) -> None:
    with pytest.raises(RankError, match="exit status -9"):
        run_distributed(die_in_a_save, 1, store.root)
    assert [path.name for path in entries(store.root)] == ["ba2", "ba4.incomplete"]
    assert list(store.staging_path(4).glob("*.distcp")), "its data was there"
    assert store.latest() == store.path(2)
    store.begin(6)
    assert [path.name for path in entries(store.root)] == ["ba2", "ba6.incomplete"]


def sharded() -> dict[str, Tensor]:
    """On a mesh of 2 x 2: sharded over one axis, over both, over none; plain tensors of all and of one rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    values = tensors()
    return {
        "model/a": distribute_tensor(values["model/a"], mesh, [Replicate(), Shard(0)]),
        "model/b": distribute_tensor(values["model/b"], mesh, [Shard(0), Shard(0)]),
        "step": values["step"],
        f"rng/{dist.get_rank()}": torch.full((3,), dist.get_rank()),
    }


def save_sharded(root: Path, fails: int | None) -> list[str]:
    import torch.distributed as dist

    failures = []
    for how in ("start", "save"):
        saver = Saver(CheckpointStore(root / how), lambda checkpoint: None)
        held = sharded()
        getattr(saver, how)(2, held, STATE, Origin(world_size=4))
        saver.finish()
        disk = mock.DEFAULT
        if dist.get_rank() == fails:
            disk = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file"))
        with mock.patch.multiple(module, write_file=disk) as patched:
            if patched:
                patched["write_file"].side_effect = write_file
            try:
                getattr(saver, how)(4, held, STATE, Origin(world_size=4))
                saver.finish()
            except UserError as error:
                failures.append(str(error))
    return failures


def test_ranks_save_together(tmp_path: Path) -> None:
    """Copies are written once, by the rank that has least to write; torch's own reader reads them."""
    assert run_distributed(save_sharded, 4, tmp_path, None) == [[]] * 4
    for how in ("start", "save"):
        checkpoint = tmp_path / how / "ba4"
        assert_equal(checkpoint, tensors())
        manifest = verify_directory(checkpoint)
        assert not list(checkpoint.glob(".part*"))
        sizes = [manifest.size(f"__{rank}_0.distcp") for rank in range(4)]
        assert sum(sizes) < 1.5 * tensors()["model/a"].nbytes + 4 * 8000, "nothing is there twice"
        assert max(sizes) < 1.5 * tensors()["model/a"].nbytes / 2 + 8000, "the two halves of a are of two ranks"
        read = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()} | {"rng/3": torch.zeros(3).long()}
        dcp.load(read, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        assert read["rng/3"].tolist() == [3, 3, 3]
        for name, tensor in tensors().items():
            assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("fails", [0, 3])
def test_row26_one_rank_that_fails_fails_all(tmp_path: Path, fails: int) -> None:
    message = "checkpoint ba4 was not saved: {}a file: No space left on device"
    expected = [message.format(""), message.format("cannot write: ")]
    assert run_distributed(save_sharded, 4, tmp_path, fails) == [expected] * 4
    for how in ("start", "save"):
        assert [path.name for path in entries(tmp_path / how)] == ["ba2"]


def shard(name: str, offsets: tuple[int, int] = (0, 0), shape: tuple[int, int] = (4, 6)) -> Shard:
    return Shard(name, SPEC, Box.at(offsets, shape))


def test_the_plan_shares_the_writing() -> None:
    whole = [shard(name) for name in "abcd"]
    top, bottom = shard("e", (0, 0), (2, 6)), shard("e", (2, 0), (2, 6))
    plan = plan_save([[*whole, top], [*whole, bottom]])
    assert plan == ((shard("a"), shard("c"), top), (shard("b"), shard("d"), bottom))


def test_a_plan_that_would_lose_something_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"e: 12 values for the shape \(4, 6\)"):
        plan_save([[shard("e", (0, 0), (2, 6))], []])
    other = Shard("e", TensorSpec((4, 6), torch.bfloat16), Box((0, 0), (4, 6)))
    with pytest.raises(ValueError, match=r"e: .*bfloat16.* on one rank, .*float32.* on another"):
        plan_save([[shard("e")], [other]])


def test_shards_share_memory_with_what_they_are_of() -> None:
    values = tensors()
    for shard, tensor in local_shards(values).items():
        assert tensor.data_ptr() == values[shard.name].data_ptr()
