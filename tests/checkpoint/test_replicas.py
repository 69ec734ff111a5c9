"""However often a tensor is copied on a mesh, its bytes leave the store once; the copies come from the other ranks."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_KEYS
from moefoundry.checkpoint.reading import ShardReader
from moefoundry.checkpoint.save import write
from moefoundry.mesh import MeshDegrees, build_meshes
from tests.checkpoint.meshes import Mesh, local, named
from tests.distributed import run_distributed

STATE = dict.fromkeys(STATE_KEYS, 0)
ROWS, COLUMNS = 1024, 500
DENSE, PLAIN = ("a", "b", "c"), ("step", "bias")
MIB = 2**20


def tensors_on(mesh: Mesh) -> dict[str, Tensor]:
    """Tensors of 2 MB on the mesh of dense parameters, filled with their own indices, and plain ones."""
    dense = build_meshes(MeshDegrees(*mesh), "cpu").dense
    placements = (Replicate(), Shard(0)) if dense.ndim == 2 else (Shard(0),)
    rows = ROWS // mesh[1]
    first = rows * dense.get_local_rank(dense.ndim - 1)
    values = torch.arange(first * COLUMNS, (first + rows) * COLUMNS, dtype=torch.float32).view(rows, COLUMNS)
    shards = {name: DTensor.from_local(values + i, dense, placements, run_check=False) for i, name in enumerate(DENSE)}
    return {**shards, **{name: torch.arange(50_000.0) for name in PLAIN}}


def load_counted(root: Path, source: Mesh, mesh: Mesh) -> dict[str, Any]:
    """What a load costs this rank, as it reports it and as seen from outside."""
    directory = root / named(source)
    if dist.get_rank() == 0:
        directory.mkdir(exist_ok=True)
    dist.barrier()
    write(directory, tensors_on(source), STATE)
    tensors, expected = tensors_on(mesh), tensors_on(mesh)
    for tensor in tensors.values():
        local(tensor).zero_()

    opened: list[str] = []
    sent: list[int] = []
    open_file, batch, broadcast = ShardReader._open_file, dist.batch_isend_irecv, dist.broadcast

    def spy_file(self: ShardReader, name: str) -> Any:
        opened.append(name)
        return open_file(self, name)

    def spy_batch(ops: list[dist.P2POp]) -> Any:
        sent.extend(op.tensor.nbytes for op in ops)
        return batch(ops)

    def spy_broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    ShardReader._open_file, dist.batch_isend_irecv, dist.broadcast = spy_file, spy_batch, spy_broadcast
    report = read_into(directory, tensors)
    assert all(torch.equal(local(tensor), local(expected[name])) for name, tensor in tensors.items())
    return {**asdict(report), "opened": opened, "sent": sent}


@pytest.mark.parametrize(
    ("source", "mesh"),
    [((2, 2, 1), (2, 2, 1)), ((4, 1, 1), (4, 1, 1)), ((1, 4, 1), (2, 2, 1)), ((4, 1, 1), (1, 4, 1))],
    ids=lambda mesh: named(mesh),
)
def test_one_copy_is_read(tmp_path: Path, source: Mesh, mesh: Mesh) -> None:
    ranks = run_distributed(load_counted, 4, tmp_path, source, mesh)
    one_copy = len(DENSE) * ROWS * COLUMNS * 4 + len(PLAIN) * 50_000 * 4
    assert sum(rank["tensor_bytes"] for rank in ranks) == one_copy
    assert sum(rank["bytes_read"] for rank in ranks) <= 1.02 * one_copy
    files = [file for rank in ranks for file in rank["opened"]]
    assert len(files) == len(set(files)), "no file is read by two ranks"
    assert not any(rank["opened"] for rank in ranks[mesh[1] :]), "the first copy alone reads"


def test_ranks_hand_on_shards_and_never_a_whole_tensor(tmp_path: Path) -> None:
    ranks = run_distributed(load_counted, 4, tmp_path, (2, 2, 1), (2, 2, 1))
    shard = ROWS // 2 * COLUMNS * 4
    for rank in ranks:
        assert max(rank["sent"]) == shard
        assert rank["sent"].count(shard) == len(DENSE), "one broadcast a tensor, and nothing sent twice"


def test_on_the_mesh_of_the_checkpoint_shards_are_not_sent(tmp_path: Path) -> None:
    for rank in run_distributed(load_counted, 4, tmp_path, (1, 4, 1), (1, 4, 1)):
        assert set(rank["sent"]) <= {50_000 * 4}, "plain tensors alone, which all ranks need"
