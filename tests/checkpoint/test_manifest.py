"""The manifest covers every byte of a checkpoint, and says so in one line where a byte is not what was saved."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefoundry.checkpoint import manifest, writer
from moefoundry.checkpoint.format import METADATA_FILE, read_metadata
from moefoundry.checkpoint.load import read_index, read_into
from moefoundry.checkpoint.manifest import (
    COMMIT_FILE,
    MANIFEST_FILE,
    RANGE_BYTES,
    STATE_FILE,
    STATE_KEYS,
    Manifest,
    Origin,
    digest,
    read_state,
)
from moefoundry.checkpoint.save import Saver, write
from moefoundry.checkpoint.store import CheckpointStore, entries
from moefoundry.config import UserError
from tests.checkpoint.forge import verify_directory

STATE = dict.fromkeys(STATE_KEYS, 3)
FILE = "__0_0.distcp"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"model/large": torch.randn(60, 50, generator=generator), "model/small": torch.arange(5)}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its hash ranges are of at most 1000 bytes."""
    for module in (manifest, writer):
        monkeypatch.setattr(module, "RANGE_BYTES", 1000)
    monkeypatch.setattr(writer, "_STEP_BYTES", 300)
    write(tmp_path, tensors(), STATE, Origin(12, {"shard": 1}, 1, "abc", {"loss": 2.5}))
    return tmp_path


def recommitted(checkpoint: Path, change: dict[str, object]) -> None:
    document = json.loads((checkpoint / MANIFEST_FILE).read_text()) | change
    content = json.dumps(document).encode()
    (checkpoint / MANIFEST_FILE).write_bytes(content)
    (checkpoint / COMMIT_FILE).write_text(digest(content))


def test_what_it_says(checkpoint: Path) -> None:
    read = verify_directory(checkpoint)
    assert (read.origin.batch, read.origin.mesh, read.origin.recipe) == (12, {"shard": 1}, "abc")
    assert read.origin.metrics == {"loss": 2.5}
    assert read.origin.versions["torch"] == torch.__version__
    assert sorted(read.files) == [".metadata", FILE, "state.json"]
    for name, ranges in read.files.items():
        content = (checkpoint / name).read_bytes()
        assert [digest(content[hashed.offset : hashed.end]) for hashed in ranges] == [
            hashed.digest for hashed in ranges
        ]
        assert read.size(name) == len(content) == sum(hashed.length for hashed in ranges)
    assert read.nbytes == sum(read.size(name) for name in read.files)
    assert len(read.files[FILE]) > 12, "60 x 50 values are 12,000 bytes"


def test_index_and_state_have_hash_ranges_like_any_other_file(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (manifest, writer):
        monkeypatch.setattr(module, "RANGE_BYTES", 30)
    (again := checkpoint / "again").mkdir()
    write(again, tensors(), STATE)
    files = verify_directory(again).files
    for name in (METADATA_FILE, STATE_FILE):
        size = (again / name).stat().st_size
        assert [hashed.offset for hashed in files[name]] == list(range(0, size, 30))
        assert files[name][-1].end == size
    assert read_state(again) == STATE
    assert read_index(again).tensors.keys() == tensors().keys()


def as_earlier_versions_wrote(checkpoint: Path) -> None:
    """Give index and state one hash range each, whatever their size."""
    document = json.loads((checkpoint / MANIFEST_FILE).read_text())
    for name in (METADATA_FILE, STATE_FILE):
        content = (checkpoint / name).read_bytes()
        document["files"][name] = [[0, len(content), digest(content)]]
    recommitted(checkpoint, document)


def test_an_index_of_more_than_one_hash_range_can_be_read(tmp_path: Path) -> None:
    """At its real size, as that of some ten thousand shards; and as earlier versions committed it."""
    name, values = "model/" + "x" * (RANGE_BYTES + 10), torch.arange(3)
    state = STATE | {"timestamp": "y" * (RANGE_BYTES + 10)}
    write(tmp_path, {name: values}, state)
    for lengths in ([RANGE_BYTES, (tmp_path / METADATA_FILE).stat().st_size - RANGE_BYTES], None):
        if lengths is None:
            as_earlier_versions_wrote(tmp_path)
            lengths = [(tmp_path / METADATA_FILE).stat().st_size]
        assert [hashed.length for hashed in verify_directory(tmp_path).files[METADATA_FILE]] == lengths
        assert read_state(tmp_path) == state
        read_into(tmp_path, {name: (read := torch.zeros_like(values))})
        assert torch.equal(read, values)
    path = tmp_path / METADATA_FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"metadata: offset 0: damaged: the {len(content)} bytes from 0 on differ"):
        verify_directory(tmp_path)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"metadata: damaged: has {len(content) - 1} bytes, not {len(content)}"):
        verify_directory(tmp_path)


def test_what_no_reader_would_take_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer whose hash ranges are too large, for one."""
    monkeypatch.setattr(manifest, "RANGE_BYTES", 1000)
    with pytest.raises(UserError, match=r"manifest\.json: unreadable checkpoint manifest: __0_0\.distcp: a hash range"):
        write(tmp_path, tensors(), STATE)
    assert not (tmp_path / COMMIT_FILE).exists()
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"^checkpoint ba4 was not saved: .*unreadable checkpoint manifest"):
        Saver(store, lambda path: None).save(4, tensors(), STATE, Origin(4))
    assert entries(store.root) == [], "nothing of it is left"


def test_a_tensor_begins_with_a_hash_range(checkpoint: Path) -> None:
    places = read_metadata(checkpoint).storage_data.values()
    starts = {hashed.offset for hashed in Manifest.read(checkpoint).files[FILE]}
    assert {place.offset for place in places} <= starts


def test_any_bytes_can_be_verified_by_the_hash_ranges_around_them(checkpoint: Path) -> None:
    read, content = Manifest.read(checkpoint), (checkpoint / FILE).read_bytes()
    ranges = read.covering(FILE, 1500, 1000)
    offset, length = ranges[0].offset, ranges[-1].end - ranges[0].offset
    assert (offset, length, len(ranges)) == (1000, 2000, 2)
    assert [hashed.offset for hashed in read.covering(FILE, 2000, 1000)] == [2000]
    assert read.covering(FILE, 2000, 0) == []
    read.verify(FILE, offset, content[offset : offset + length])
    wrong = bytearray(content[offset : offset + length])
    wrong[1200] ^= 1
    with pytest.raises(
        UserError, match=rf"{FILE}: offset 1000, tensor w: damaged: the 1000 bytes from 2000 on differ from what was"
    ):
        read.verify(FILE, offset, memoryview(wrong), "w")
    with pytest.raises(UserError, match=rf"{FILE}: offset 1500: 1000 bytes are no whole hash ranges"):
        read.verify(FILE, 1500, content[1500:2500])
    with pytest.raises(UserError, match=rf"{FILE}: has {len(content)} bytes, not 9 from {len(content) - 5} on"):
        read.covering(FILE, len(content) - 5, 9)
    with pytest.raises(UserError, match=r"other: not a file of this checkpoint, says its manifest\.json"):
        read.covering("other", 0, 1)


def test_row8_every_single_flipped_bit_is_found(checkpoint: Path) -> None:
    for name in (FILE, ".metadata", "state.json", MANIFEST_FILE, COMMIT_FILE):
        path = checkpoint / name
        content = path.read_bytes()
        for position in {0, len(content) // 3, len(content) // 2, len(content) - 2}:
            damaged = bytearray(content)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{re.escape(str(checkpoint))}/.*{re.escape(name)}"):
                verify_directory(checkpoint)
        path.write_bytes(content)
    verify_directory(checkpoint)


def test_every_damaged_file_is_named(checkpoint: Path) -> None:
    (checkpoint / FILE).unlink()
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UserError) as raised:
        verify_directory(checkpoint)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert f"{checkpoint / FILE}: unreadable: No such file or directory" in lines
    assert any(re.search(r"state\.json: damaged: has 2 bytes, not \d+$", line) for line in lines)


@pytest.mark.parametrize("name", [MANIFEST_FILE, COMMIT_FILE])
def test_without_its_marker_or_manifest_it_is_no_checkpoint(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert not manifest.is_committed(checkpoint)
    with pytest.raises(UserError, match=rf"{name}: .*No such file"):
        Manifest.read(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"format 2; this release reads 1"),
        ({"files": {"../state.json": []}}, r"'\.\./state\.json' is no name of a file here"),
        ({"files": {"..": []}}, r"'\.\.' is no name of a file here"),
        ({"files": {"a": [[5, 10, "x"]]}}, r"a: a hash range of 10 bytes at 5, where 0 is next"),
        ({"files": {"a.distcp": [[0, 10**15, "x"]]}}, r"a\.distcp: a hash range of 1000000000000000 bytes at 0"),
        ({"files": {"a": [[0, 9, "x"], [9, 10**15, "x"]]}}, r"a: a hash range of 1000000000000000 bytes at 9"),
        ({"files": {"a": [[0, -1, "x"]]}}, r"a: a hash range of -1 bytes"),
        ({"files": {"a": [[0, "1", "x"]]}}, r"a: \[0, '1', 'x'\] is no hash range"),
        ({"files": []}, "attribute 'items'"),
        ({"mesh": None}, "attribute 'items'"),
    ],
)
def test_a_hostile_manifest_is_refused(checkpoint: Path, change: dict[str, object], message: str) -> None:
    recommitted(checkpoint, change)
    with pytest.raises(UserError, match=rf"^{re.escape(str(checkpoint))}/manifest\.json: unreadable.*{message}"):
        Manifest.read(checkpoint)


def test_manifest_and_marker_belong_together(checkpoint: Path) -> None:
    with (checkpoint / MANIFEST_FILE).open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"manifest\.json: its hash is not the one in COMMITTED"):
        Manifest.read(checkpoint)
