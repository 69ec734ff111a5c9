"""Faults of one of two streams: each ends the run on every rank, with the name of what is wrong, and within seconds."""

import itertools
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from streaming.base.storage.download import LocalDownloader

from moefoundry.config import LoaderConfig, UserError
from moefoundry.config.curriculum import Stage
from moefoundry.config.schema_data import FimConfig, PackingConfig, PackingMethod, StreamConfig
from moefoundry.data.loader import build_loader, dead_processes_named
from tests.data.shards import VOCAB, config_of, flip_bit
from tests.data.test_guard import CORRUPT, without_waiting
from tests.distributed import run_distributed

STAGES = (
    Stage("short", 0, 3, batch_size=4, seq_len=8, microbatch_size=1),
    Stage("long", 3, None, batch_size=4, seq_len=16, microbatch_size=1),
)
FAULTS = ("corrupt", "truncated", "missing")


def config(text: Path, code: Path, cache: Path | None = None, workers: int = 0) -> LoaderConfig:
    """Both streams; with a cache, these are their remote places."""
    places = {"text": text, "code": code}
    streams = {
        name: StreamConfig(local=str(place if cache is None else cache / name), remote=cache and str(place))
        for name, place in places.items()
    }
    keys = {"streams": streams, "packing": PackingConfig(PackingMethod.best_fit), "fim": FimConfig(rate=0.5)}
    return replace(config_of(text, **keys), num_workers=workers)


def damage(shard: Path, fault: str) -> None:
    if fault == "corrupt":
        flip_bit(shard)
    elif fault == "truncated":
        os.truncate(shard, 60)
    else:
        shard.unlink()


def read_all(configs: list[LoaderConfig], tokenizer: Path, stages: tuple[Stage, ...]) -> list[str | int]:
    """What this rank gets of each: a message, or the number of batches."""
    without_waiting()
    outcomes: list[str | int] = []
    for each in configs:
        try:
            loader = build_loader(each, batch_size=2, model_vocab_size=VOCAB, tokenizer=tokenizer, stages=stages)
            taken = 0
            while taken < 30:
                taken += sum(1 for _ in loader)
            outcomes.append(taken)
        except UserError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        if dist.is_initialized():
            dist.barrier()
    return outcomes


FAST = [(2, ("corrupt",), False, ())]
ALL = [
    (workers, FAULTS, remote, stages) for workers in (0, 1, 2) for remote in (False, True) for stages in ((), STAGES)
]


@pytest.mark.parametrize(
    ("workers", "faults", "remote", "stages"),
    [*FAST, (0, FAULTS, True, STAGES), *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_row11_row12_a_bad_shard_of_one_stream(
    mixture: Path, tmp_path: Path, workers: int, faults: tuple[str, ...], remote: bool, stages: tuple[Stage, ...]
) -> None:
    configs = []
    bad = sorted(path.name for path in (mixture / "code" / "train").glob("shard.*"))[1]
    for fault in faults:
        shutil.copytree(mixture / "code", tmp_path / fault)
        damage(tmp_path / fault / "train" / bad, fault)
        cache = tmp_path / f"cache {fault}" if remote else None
        configs.append(config(mixture / "text", tmp_path / fault, cache, workers))
    configs.append(config(mixture / "text", mixture / "code", None, workers))
    for outcomes in run_distributed(read_all, 2, configs, mixture / "text" / "tokenizer", stages, timeout=40):
        for fault, outcome in zip(faults, outcomes, strict=False):
            expected = {"corrupt": CORRUPT, "truncated": "truncated shard: 60 bytes of", "missing": "missing shard"}
            reason = "[Errno 2] No such file" if remote and fault == "missing" else expected[fault]
            assert str(outcome).startswith("DataError: ") or not remote, outcome
            assert f"{tmp_path}/{fault}/train/{bad}: {reason}" in str(outcome)
            assert "\n" not in str(outcome)
            assert "text" not in str(outcome), "nothing is wrong there"
        assert int(outcomes[-1]) >= 30, "one loader's fault is not the next one's"


def failing(configs: list[LoaderConfig], tokenizer: Path, times: int) -> list[str | int]:
    """Each file of the stream ``code`` fails so many times; the others are had at once."""
    download, failed = LocalDownloader._download_file_impl, list[str]()

    def flaky(self: LocalDownloader, source: str, *args: object) -> None:
        if "/code/" in source and "shard" in source and failed.count(source) < times:
            failed.append(source)
            raise ConnectionError("reset by peer")
        download(self, source, *args)

    LocalDownloader._download_file_impl = flaky
    return read_all(configs, tokenizer, ())


@pytest.mark.parametrize("workers", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2))])
def test_row20_a_remote_stream_that_fails_is_tried_again_and_then_named(
    mixture: Path, tmp_path: Path, workers: int
) -> None:
    tokenizer = mixture / "text" / "tokenizer"
    for times, name in ((1, "once"), (10**6, "for good")):
        remote = config(mixture / "text", mixture / "code", tmp_path / name, workers)
        for (outcome,) in run_distributed(failing, 2, [remote], tokenizer, times, timeout=40):
            if name == "once":
                assert int(outcome) >= 30
            else:
                assert str(outcome).startswith(f"DataError: {mixture}/code/train/shard.0")
                assert str(outcome).endswith("reset by peer")


def test_a_stream_without_index_and_a_cache_of_other_data_are_named_on_every_rank(
    mixture: Path, tmp_path: Path
) -> None:
    shutil.copytree(mixture / "code", tmp_path / "lacking")
    (tmp_path / "lacking" / "train" / "index.json").unlink()
    shutil.copytree(mixture / "text" / "train", tmp_path / "cache" / "code" / "train")
    configs = [
        config(mixture / "text", tmp_path / "lacking", tmp_path / "first"),
        config(mixture / "text", mixture / "code", tmp_path / "cache"),
    ]
    for lacking, other in run_distributed(read_all, 2, configs, mixture / "text" / "tokenizer", ()):
        assert str(lacking).startswith(f"UserError: {tmp_path}/lacking/train/index.json: cannot be downloaded: ")
        assert f"{tmp_path}/cache/code/train/index.json: differs from {mixture}/code/train/index.json" in str(other)


def kill_a_worker(chosen: LoaderConfig, tokenizer: Path, stages: tuple[Stage, ...]) -> str:
    """What a rank raises, one of whose loader processes is killed."""
    loader = build_loader(chosen, batch_size=2, model_vocab_size=VOCAB, tokenizer=tokenizer, stages=stages)
    try:
        with dead_processes_named():
            for number, _ in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
                if number == 1:
                    victim = loader._iterator._workers[-1].pid
                    os.kill(victim, signal.SIGKILL)
    except UserError as error:
        return str(error).replace(str(victim), "PID")
    raise AssertionError("the loader goes on for ever")


SLOW_DEATHS = [pytest.param(workers, stages, marks=pytest.mark.slow) for workers, stages in ((2, ()), (1, STAGES))]


@pytest.mark.parametrize(("workers", "stages"), [(1, ()), (2, STAGES), *SLOW_DEATHS])
def test_a_loader_process_that_is_killed_ends_its_rank(mixture: Path, workers: int, stages: tuple[Stage, ...]) -> None:
    chosen = config(mixture / "text", mixture / "code", None, workers)
    for message in run_distributed(kill_a_worker, 1, chosen, mixture / "text" / "tokenizer", stages, timeout=30):
        assert message.startswith("loader process PID was killed from outside; if the machine has run out of memory, ")
