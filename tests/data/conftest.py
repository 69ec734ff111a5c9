"""Fixtures of the tests of loaders."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streaming import StreamingDataLoader
from streaming.base.shared import SharedMemory

from moefoundry.config.schema_parts import LoaderConfig
from moefoundry.data import prepare as prepare_module
from moefoundry.data.loader import build_loader
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout
from tests.data.shards import SEQ_LEN, VOCAB


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of several shards."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (root / f"{number:02d}.txt").write_text(f"line {number} of a text, {number * 7}\n" * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD_BYTES", 4096)
        prepare(PrepareOptions(str(root), root / "out", max_seq_len=SEQ_LEN, vocab_size=VOCAB, val_fraction=0.2))
    return root / "out"


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared corpora ``code`` and ``text`` of one tokenizer, as documents, of several shards each."""
    root = tmp_path_factory.mktemp("mixture")
    for number in range(40):
        (root / "text").mkdir(exist_ok=True)
        (root / "code").mkdir(exist_ok=True)
        (root / "text" / f"{number:02d}.txt").write_text(f"line {number}\n" * (number % 4 + 1))
        (root / "code" / f"{number:02d}.py").write_text(f"x{number} = {number * 7}\n" * (number % 3 + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD_BYTES", 512)
        options = PrepareOptions(
            str(root / "text"), root / "out" / "text", vocab_size=VOCAB, val_fraction=0.2, layout=Layout.documents
        )
        prepare(options)
        source, out, tokenizer = str(root / "code"), root / "out" / "code", root / "out" / "text" / "tokenizer"
        prepare(replace(options, source=source, out=out, tokenizer=tokenizer))
        packed = replace(options, out=root / "out" / "packed", layout=Layout.packed, max_seq_len=SEQ_LEN)
        prepare(packed)
    return root / "out"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StreamingDataLoader]]:
    """:func:`build_loader` whose threads, lock files and shared memory are gone after the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: None)  # between attempts to download
    segments: list[SharedMemory] = []
    make = SharedMemory.__init__

    def recording(self: SharedMemory, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)
        segments.append(self)

    monkeypatch.setattr(SharedMemory, "__init__", recording)
    loaders: list[StreamingDataLoader] = []

    def builder(
        config: LoaderConfig, *, batch_size: int = 4, model_vocab_size: int = VOCAB, **options: Any
    ) -> StreamingDataLoader:
        loaders.append(build_loader(config, batch_size=batch_size, model_vocab_size=model_vocab_size, **options))
        return loaders[-1]

    yield builder
    for loader in loaders:
        if hasattr(loader.dataset, "_iterator"):
            loader.dataset._iterator.exit()
    for segment in segments:
        segment.cleanup()
