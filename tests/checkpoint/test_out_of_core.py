"""Checkpoints written shard by shard are like any other; of any other, any box can be read."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefoundry.checkpoint import out_of_core
from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_FILE, STATE_KEYS, WEIGHTS_ONLY, read_state
from moefoundry.checkpoint.out_of_core import ShardValues, StoredTensors, row_ranges, write_shards
from moefoundry.checkpoint.save import write
from moefoundry.config import UserError
from moefoundry.config.versions import FORMAT_VERSION
from tests.distributed import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STATE = {WEIGHTS_ONLY: True, "recipe": {"format_version": FORMAT_VERSION}}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "experts": torch.randn(4, 6, 5, generator=generator),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "count": torch.arange(3),
    }


def specs() -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors().items()}


def some_shards() -> Iterator[ShardValues]:
    """Experts one by one in two parts each, last first; others whole. All are views of something larger."""
    values = tensors()
    for expert in reversed(range(4)):
        for rows in ((0, 2), (2, 6)):
            yield ShardValues("experts", (expert, rows[0], 0), values["experts"][expert : expert + 1, slice(*rows)])
    yield ShardValues("half", (0, 0), values["half"].repeat(2, 2)[:7, :3])
    yield ShardValues("scalar", (), values["scalar"])
    yield ShardValues("count", (0,), values["count"].flip(0).flip(0))


@pytest.mark.parametrize("file_bytes", [1, 10**9], ids=["a file a shard", "one file"])
def test_any_reader_of_checkpoints_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    monkeypatch.setattr(out_of_core, "FILE_BYTES", file_bytes)
    write_shards(tmp_path, specs(), some_shards(), STATE)
    assert len(list(tmp_path.glob("*.distcp"))) == (11 if file_bytes == 1 else 1)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    read_into(tmp_path, read)
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor), name
    assert read_state(tmp_path) == STATE


def test_narrow_tensors_are_read_into_wide_ones(tmp_path: Path) -> None:
    """Master weights are fp32, whatever a checkpoint was imported as."""
    write_shards(tmp_path, specs(), some_shards(), STATE)
    read = {"half": torch.zeros(7, 3)}
    read_into(tmp_path, read)
    assert torch.equal(read["half"], tensors()["half"].float())


@pytest.mark.parametrize("written_by", ["shard by shard", "whole"])
def test_any_part_can_be_read(tmp_path: Path, written_by: str) -> None:
    if written_by == "shard by shard":
        write_shards(tmp_path, specs(), some_shards(), STATE)
    else:
        write(tmp_path, tensors(), dict.fromkeys(STATE_KEYS, 0))
    stored, expected = StoredTensors(tmp_path), tensors()
    assert stored.specs == specs()
    for name, tensor in expected.items():
        assert torch.equal(stored.read(name), tensor), name
        assert torch.equal(torch.cat(list(stored.rows(name))) if tensor.dim() else stored.read(name), tensor)
    assert torch.equal(stored.read("experts", (1, 3)), expected["experts"][1:3])
    assert torch.equal(stored.read("experts", (2, 3), (1, 5)), expected["experts"][2:3, 1:5])
    assert torch.equal(stored.read("experts", (0, 4), (1, 4), (2, 3)), expected["experts"][:, 1:4, 2:3])


def test_a_transposed_tensor_is_read_as_it_was(tmp_path: Path) -> None:
    """DCP keeps the strides of what it saves."""
    write(tmp_path, {"w": torch.arange(6.0).view(2, 3).t()}, dict.fromkeys(STATE_KEYS, 0))
    assert StoredTensors(tmp_path).read("w", (1, 3)).tolist() == [[1, 4], [2, 5]]


def test_names_without_their_prefix(tmp_path: Path) -> None:
    write(tmp_path, {"model/w": torch.ones(2), "optimizer/w": torch.zeros(2)}, dict.fromkeys(STATE_KEYS, 0))
    stored = StoredTensors(tmp_path, "model/")
    assert list(stored.specs) == ["w"]
    assert stored.read("w").tolist() == [1, 1]


def write_on_a_mesh(directory: Path) -> None:
    """What a mesh of 2 x 2 saves: rows over one axis and columns over the other, unevenly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    values = tensors()
    shards = {
        "experts": distribute_tensor(values["experts"], mesh, [Shard(0), Shard(2)]),
        "half": distribute_tensor(values["half"], mesh, [Replicate(), Shard(0)]),
    }
    write(directory, shards, dict.fromkeys(STATE_KEYS, 0))


def test_parts_are_put_together_from_the_files_of_all_ranks(tmp_path: Path) -> None:
    run_distributed(write_on_a_mesh, 4, tmp_path)
    stored, expected = StoredTensors(tmp_path), tensors()
    assert torch.equal(stored.read("experts"), expected["experts"])
    assert torch.equal(stored.read("experts", (1, 3), (2, 6), (1, 5)), expected["experts"][1:3, 2:6, 1:5])
    assert torch.equal(stored.read("half", (3, 6)), expected["half"][3:6])


def test_row_ranges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_core, "SHARD_BYTES", 100)
    assert list(row_ranges(TensorSpec((7, 6), torch.float32))) == [(0, 4), (4, 7)]  # 24 bytes a row
    assert list(row_ranges(TensorSpec((2, 60), torch.float32))) == [(0, 1), (1, 2)]  # 240 bytes a row
    assert list(row_ranges(TensorSpec((3,), torch.float32))) == [(0, 3)]


def test_shards_that_do_not_fill_a_tensor_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experts: 90 values for the shape \(4, 6, 5\)"):
        write_shards(tmp_path, specs(), list(some_shards())[2:], STATE)
    with pytest.raises(ValueError, match=r"count: a shard of torch.int64, not torch.float32"):
        write_shards(tmp_path, specs() | {"count": TensorSpec((3,), torch.float32)}, some_shards(), STATE)
    assert not (tmp_path / STATE_FILE).exists(), "which would make it a checkpoint"


@pytest.mark.parametrize("damage", ["missing", "truncated", "overwritten"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    write_shards(tmp_path, specs(), some_shards(), STATE)
    (file,) = tmp_path.glob("*.distcp")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\0" * len(content))
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: .*(unreadable|damaged)"):
        StoredTensors(tmp_path).read("count")
