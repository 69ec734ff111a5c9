"""Bad shards end a run, on every rank and with the shard's name. "Remote" is a directory, as a mounted store is."""

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from streaming.base.storage.download import LocalDownloader

from moefoundry.config import DataError, LoaderConfig, Recipe, UserError
from moefoundry.data import guard
from moefoundry.data import segments as shared
from moefoundry.data.guard import GuardedDataset
from moefoundry.data.loader import build_loader
from moefoundry.data.segments import NodeFailure, remove_stale_segments
from tests.data.shards import VOCAB, config_of, flip_bit, tokens_of
from tests.distributed import captured_output, run_distributed
from tests.train.runs import run_recipe

BAD = "shard.00001.mds"
CORRUPT = "corrupt shard: its xxh64 is not the one in the index"


@pytest.fixture
def remote(corpus: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(corpus, tmp_path / "remote")
    return tmp_path / "remote"


def without_waiting() -> None:
    """Between attempts to download."""
    from streaming.base import util

    util.sleep = lambda seconds: None


def read_epochs(configs: list[LoaderConfig]) -> list[str | int]:
    """What this rank gets of an epoch of each loader: a message, or how many batches."""
    without_waiting()
    outcomes: list[str | int] = []
    for config in configs:
        try:
            loader = build_loader(config, batch_size=2, model_vocab_size=VOCAB)
            outcomes.append(sum(1 for _ in loader))
        except UserError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


@pytest.mark.parametrize("workers", [0, 2])
def test_row11_a_bad_remote_shard_ends_every_rank(remote: Path, tmp_path: Path, workers: int) -> None:
    """Neither an early end of the epoch nor ranks or loader processes that wait for the shard."""
    configs = []
    faults = ("corrupt", "missing") if workers else ("corrupt", "missing", "truncated", "whole")  # processes take time
    for fault in faults:
        there = tmp_path / fault
        shutil.copytree(remote, there)
        shard = there / "train" / BAD
        if fault == "corrupt":
            flip_bit(shard)
        elif fault == "missing":
            shard.unlink()
        elif fault == "truncated":
            os.truncate(shard, 100)
        config = config_of(tmp_path / f"cache of {fault}", remote=str(there))
        configs.append(replace(config, num_workers=workers))
    for outcomes in run_distributed(read_epochs, 2, configs, timeout=60):
        corrupt, missing, *others = outcomes
        assert corrupt == f"DataError: {tmp_path}/corrupt/train/{BAD}: {CORRUPT}"
        assert str(missing).startswith(f"DataError: {tmp_path}/missing/train/{BAD}: [Errno 2] No such file")
        assert "\n" not in str(missing)
        if others:
            assert f"{tmp_path}/truncated/train/{BAD}: truncated shard: 100 bytes of" in str(others[0])
            assert int(others[1]) > 10, "nothing is wrong there"
    assert (tmp_path / "cache of corrupt" / "train" / "index.json").exists()
    assert not (tmp_path / "cache of corrupt" / "train" / BAD).exists(), "the next run would find it"


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of ``moefoundry train`` on this rank; 1 where Python would print a traceback."""
    from moefoundry.cli.main import main

    without_waiting()
    status = 1
    with captured_output() as texts:
        try:
            status = main(["train", *arguments])
        except Exception as error:  # the other rank has gone
            return status, repr(error)
    return status, texts[1]


def test_row11_training_exits_with_the_shards_name(
    tiny_overrides: Callable[..., list[str]], tiny_corpus: Path, tmp_path: Path
) -> None:
    there, here = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(tiny_corpus, there)
    flip_bit(there / "train" / "shard.00000.mds")
    data = (f"train_loader.dataset.local={here}", f"train_loader.dataset.remote={there}", "eval_loader=null")
    arguments = tiny_overrides(tmp_path / "run", *data, f"tokenizer.name={tiny_corpus / 'tokenizer'}")
    named = f"error: {there}/train/shard.00000.mds: {CORRUPT}\n"
    outcomes = run_distributed(command, 2, arguments, timeout=30)
    assert (2, named) in [(status, error[-len(named) :]) for status, error in outcomes]
    assert all(status != 0 for status, _ in outcomes)


def test_row11_a_download_that_fails_once_is_tried_again(
    remote: Path, build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, failed = LocalDownloader._download_file_impl, []

    def flaky(self: LocalDownloader, source: str, *args: Any) -> None:
        if source not in failed:
            failed.append(source)
            raise ConnectionError("reset by peer")
        download(self, source, *args)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", flaky)
    assert tokens_of(build(config_of(tmp_path / "cache", remote=str(remote)))) == tokens_of(build(config_of(remote)))
    assert [Path(source).name for source in failed[:2]] == ["index.json", "shard.00000.mds"]


def test_row11_an_epoch_that_ends_early_is_an_error_whatever_ended_it(
    corpus: Path, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = GuardedDataset._each_sample_id

    def first_five(self: GuardedDataset, it: Any) -> Iterator[int]:
        for _, sample_id in zip(range(5), each(self, it), strict=False):
            yield sample_id
        it.yield_index = it.total  # the other threads need not wait
        it.on_exit()

    monkeypatch.setattr(GuardedDataset, "_each_sample_id", first_five)
    with pytest.raises(DataError, match=r"train: the epoch ended after 5 of \d\d+ samples"):
        list(build(config_of(corpus)).dataset)


def test_row11_a_background_thread_that_fails_otherwise_is_named_too(
    corpus: Path, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: GuardedDataset, it: Any) -> None:
        raise MemoryError("no memory for more")

    monkeypatch.setattr(GuardedDataset, "_prepare_thread", broken)
    with pytest.raises(DataError, match=r"MemoryError\('no memory for more'\)"):
        tokens_of(build(config_of(corpus)))


@pytest.mark.parametrize("cached", [False, True], ids=["local", "cached"])
def test_row12_a_flipped_bit_is_found_before_its_samples_are_read(
    remote: Path, build: Callable, tmp_path: Path, cached: bool
) -> None:
    local = tmp_path / "cache" if cached else remote
    config = config_of(local, **({"remote": str(remote)} if cached else {}))
    if cached:
        shutil.copytree(remote / "train", local / "train")
    expected = {tuple(sample) for batch in tokens_of(build(config)) for sample in batch}
    flip_bit(local / "train" / BAD)
    remedy = "delete it, and it is downloaded again" if cached else "prepare the data again"
    message = f"{local}/train/{BAD}: {CORRUPT}; {remedy}"
    loader, read = build(config), []
    with pytest.raises(DataError) as raised:
        read.extend(sample for batch in loader for sample in batch["input_ids"].tolist())
    assert str(raised.value) == message
    assert {tuple(sample) for sample in read} <= expected
    unchecked = replace(config, dataset=replace(config.dataset, validate_hash=None))
    damaged = {tuple(sample) for batch in tokens_of(build(unchecked, model_vocab_size=2**16)) for sample in batch}
    assert not damaged <= expected


def hash_calls(config: LoaderConfig, calls: Path) -> int:
    """Read an epoch; each hash that is computed adds a line to ``calls``."""
    get_hash = guard.get_hash

    def noted(algorithm: str, data: Any) -> str:
        with calls.open("a") as file:
            file.write(f"{len(data)}\n")
        return get_hash(algorithm, data)

    guard.get_hash = noted
    return sum(1 for _ in build_loader(config, batch_size=2, model_vocab_size=VOCAB))


def test_row12_a_shard_is_hashed_once_a_node(corpus: Path, tmp_path: Path) -> None:
    config = replace(config_of(corpus), num_workers=1)
    run_distributed(hash_calls, 2, config, tmp_path / "calls")
    index = json.loads((corpus / "train" / "index.json").read_text())
    sizes = sorted(shard["raw_data"]["bytes"] for shard in index["shards"])
    assert sorted(map(int, (tmp_path / "calls").read_text().split())) == sizes


def test_row12_a_cache_of_other_data_is_named_on_every_rank(remote: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache", remote=str(remote))
    shutil.copytree(remote / "train", tmp_path / "cache" / "train")
    index = remote / "train" / "index.json"
    index.write_text(index.read_text().replace('"samples": ', '"samples":  '))
    outcomes = run_distributed(read_epochs, 2, [config])
    directory = tmp_path / "cache" / "train"
    error = f"{directory}/index.json: differs from {index}: a cache of other data; delete {directory}"
    assert outcomes == [[f"UserError: {error}"]] * 2
    assert [path.name for path in directory.glob("index*")] == ["index.json"]


def test_row13_a_hash_that_the_index_lacks_is_an_error_at_the_start(remote: Path, build: Callable) -> None:
    for algorithm in ("sha256", "no-such-hash"):
        with pytest.raises(UserError) as raised:
            build(config_of(remote, validate_hash=algorithm))
        assert f"train/index.json: no {algorithm} of shard.00000.mds; it has sha1, xxh64 " in str(raised.value)
    assert tokens_of(build(config_of(remote, validate_hash="sha1")), 2)


def test_an_index_that_cannot_be_had_or_read_is_named(remote: Path, build: Callable, tmp_path: Path) -> None:
    index = remote / "train" / "index.json"
    index.write_text("{")
    with pytest.raises(UserError, match=r"first/train/index\.json: cannot be read: "):
        build(config_of(tmp_path / "first", remote=str(remote)))
    index.unlink()
    with pytest.raises(UserError, match=rf"{index}: cannot be downloaded: .*No such file"):
        build(config_of(tmp_path / "second", remote=str(remote)))


def segments() -> set[str]:
    """Names in shared memory of this test's runs (see :func:`run_distributed`)."""
    from streaming.base.shared import prefix

    first = next(prefix._each_prefix_int())
    return {path.name for number in range(first, first + 10) for path in shared.SEGMENTS.glob(f"{number:06}_*")}


def in_child(config: LoaderConfig, killed: bool) -> int:
    """Fork a run that has read a batch and then is killed, or lives; its process id."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        tempfile.tempdir = tempfile.mkdtemp()  # where lock files are, which another container does not see
        loader = build_loader(config, batch_size=2, model_vocab_size=VOCAB)
        tokens_of(loader, 1)
        os.write(writer, b".")
        os.kill(os.getpid(), signal.SIGKILL) if killed else signal.pause()
    os.close(writer)
    assert os.read(reader, 1) == b"."
    if killed:
        os.waitpid(child, 0)
    return child


def start_beside(config: LoaderConfig, killed: bool, clean: bool) -> tuple[set[str], set[str], str | int]:
    """Segments before and after a run that starts where another's segments are, and what it got of its data."""
    child = in_child(config, killed)
    before = segments()
    if not clean:
        guard.remove_stale_segments = lambda: None
    outcome = read_epochs([config])[0]
    after = segments()
    if not killed:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return before, after, outcome


def test_row16_shared_memory_of_a_killed_run_is_removed_and_the_run_starts(corpus: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache", remote=str(corpus))
    before, _, outcome = run_distributed(start_beside, 1, config, True, False)[0]
    assert len(before) == 7
    assert str(outcome).startswith(f"UserError: {tmp_path}/cache/train: the cache of another run"), "without removal"
    before, after, outcome = run_distributed(start_beside, 1, config, True, True)[0]
    assert int(outcome) > 10
    assert len(before) == 7
    assert after <= before, "under the same number: its own"


def test_row16_shared_memory_of_a_living_run_stays(corpus: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache", remote=str(corpus))
    before, after, outcome = run_distributed(start_beside, 1, config, False, True)[0]
    assert before <= after
    assert str(outcome).startswith(f"UserError: {tmp_path}/cache/train: the cache of another run on this machine;")


def meet(place: Path) -> bool:
    """Wait for another process at ``place``; whether one came."""
    own = place / str(os.getpid())
    place.mkdir(exist_ok=True)
    own.touch()
    until = time.monotonic() + 0.2
    while not (met := len(list(place.iterdir())) > 1) and time.monotonic() < until:
        time.sleep(0.005)
    own.unlink()
    return met


def start_as_two_runs(configs: list[LoaderConfig], places: Path) -> tuple[int | str, set[str]]:
    """Each rank is a run of its own; its number or message, and where it could meet the other one."""
    config = configs[dist.get_rank()]
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    met = set()
    remove, make = guard.remove_stale_segments, BuiltinSharedMemory.__init__

    def removing() -> None:
        if meet(places / "removal"):
            met.add("removal")
        remove()

    def making(self: BuiltinSharedMemory, name: str, create: bool = False, size: int = 0) -> None:
        if create and name.endswith("_locals") and meet(places / "choice"):
            met.add("choice")
        make(self, name, create, size)

    guard.remove_stale_segments, BuiltinSharedMemory.__init__ = removing, making
    try:
        return build_loader(config, batch_size=2, model_vocab_size=VOCAB).dataset._shm_prefix_int, met
    except (OSError, UserError) as error:
        return f"{type(error).__name__}: {error}", met


def test_row16_runs_that_start_at_once_take_different_numbers(corpus: Path, tmp_path: Path) -> None:
    configs = [config_of(tmp_path / name, remote=str(corpus)) for name in ("first", "second")]
    (first, first_met), (second, second_met) = run_distributed(start_as_two_runs, 2, configs, tmp_path)
    assert {type(first), type(second)} == {int}, (first, second)
    assert first != second
    assert not first_met | second_met


def start_with_another_view(config: LoaderConfig) -> tuple[int, int]:
    """The first number that this rank sees free, and the one of its segments."""
    from streaming.base.shared import prefix

    first = next(prefix._each_prefix_int()) + dist.get_rank()  # on rank 1, as if a run had ended since rank 0 looked
    prefix._each_prefix_int = lambda: count(first)
    return first, build_loader(config, batch_size=2, model_vocab_size=VOCAB).dataset._shm_prefix_int


def test_row16_ranks_agree_on_a_number_while_other_runs_come_and_go(corpus: Path) -> None:
    (first, number), (other, same) = run_distributed(start_with_another_view, 2, config_of(corpus))
    assert (number, same) == (first, first)
    assert other != first


def test_row16_a_number_that_any_name_begins_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "SEGMENTS", tmp_path / "segments")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "segments").mkdir()
    for name in ("segments/000003_locals", "segments/000004_moefoundry", "000005_cache_filelock", "segments/000007_x"):
        (tmp_path / name).touch()
    assert [shared.free_number(first) for first in (2, 3, 5, 7)] == [2, 6, 6, 8]


def test_row16_who_stays_while_he_starts_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "SEGMENTS", tmp_path)
    monkeypatch.setattr(shared, "PATIENCE", 0.05)
    with shared.sole_starter(), pytest.raises(UserError, match=f"{tmp_path}: a process has locked it"):
        shared.sole_starter().__enter__()
    with shared.sole_starter():
        pass


def test_row16_only_what_no_process_holds_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "SEGMENTS", tmp_path)
    for number in ("000001", "000002", "000003"):
        (tmp_path / f"{number}_locals").write_text("segment")
    dead, living = tmp_path / "000001_moefoundry", tmp_path / "000002_moefoundry"
    dead.touch()
    with living.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        remove_stale_segments()
    assert {path.name for path in tmp_path.iterdir()} == {"000002_locals", "000002_moefoundry", "000003_locals"}


def test_the_flag_of_a_node_carries_the_first_reason_to_every_process(tmp_path: Path) -> None:
    failure = NodeFailure.create(tmp_path / "000001_moefoundry")
    other = pickle.loads(pickle.dumps(failure))
    other.raise_if_set()
    failure.set("shard 1 is bad")
    other.set("shard 2 is bad")
    for end in (failure, other):
        with pytest.raises(DataError, match=r"^shard 1 is bad$"):
            end.raise_if_set()
    del end, failure
    assert not (tmp_path / "000001_moefoundry").exists()


def signal_a_worker(config: LoaderConfig) -> tuple[bool, int | None]:
    """Whether a loader process survives another process's SIGTERM, and how it ends at that of its rank."""
    loader = build_loader(config, batch_size=2, model_vocab_size=VOCAB)
    next(iter(loader))
    (worker,) = loader._iterator._workers
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.2)
    survived = worker.is_alive()
    worker.terminate()
    worker.join(5)
    return survived, worker.exitcode


def test_row19_a_loader_process_obeys_its_rank_alone(corpus: Path) -> None:
    config = replace(config_of(corpus), num_workers=1)
    assert run_distributed(signal_a_worker, 1, config) == [(True, 0)]


def test_row5_another_global_batch_size_is_refused_unless_asked_for(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    steps = ("max_duration=4ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1")
    run_recipe(tiny_recipe(tmp_path / "first", *steps))
    checkpoint = tmp_path / "first" / "checkpoints" / "ba2"
    other = (*steps, "global_train_batch_size=4", f"load_path={checkpoint}")
    with pytest.raises(UserError) as raised:
        run_recipe(tiny_recipe(tmp_path / "second", *other))
    assert str(raised.value).startswith(f"global_train_batch_size: 4, and {checkpoint} was written with 8; ")
    assert not (tmp_path / "second" / "config.yaml").exists()
    run = run_recipe(tiny_recipe(tmp_path / "second", *other, "allow_batch_size_change=true"))
    assert list(run.exact()) == [3, 4]
