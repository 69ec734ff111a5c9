"""What any mesh has saved, any other loads, bit for bit; what is damaged is found while it is read, and named."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.checkpoint.format import read_metadata
from moefoundry.checkpoint.load import _Loader, read_into
from moefoundry.checkpoint.manifest import STATE_KEYS
from moefoundry.checkpoint.ranks import rank
from moefoundry.checkpoint.reading import AHEAD, Read, ShardReader, Wanted
from moefoundry.checkpoint.save import write
from moefoundry.config import UserError
from tests.checkpoint.meshes import MESHES, Mesh, differing, local, named, state_on
from tests.distributed import run_distributed

STATE = dict.fromkeys(STATE_KEYS, 0)


def save(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """From the ranks that hold ``tensors``."""
    if rank() == 0:
        directory.mkdir()
    if dist.is_initialized():
        dist.barrier()
    write(directory, tensors, STATE)
    return directory


def save_on(directory: Path, mesh: Mesh) -> None:
    save(directory, state_on(mesh))


def wrongly_loaded(directory: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what is not as it was saved, on this rank."""
    for tensor in tensors.values():
        local(tensor).fill_(7)
    assert len(differing(tensors, expected)) > 40, "nothing is right before"
    read_into(directory, tensors)
    return differing(tensors, expected)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(tensor).clone() for name, tensor in tensors.items()}


def load_each_other(root: Path, meshes: list[Mesh], num_experts: int, every_pair: bool) -> dict[str, list[str]]:
    """Each mesh loads what the mesh before it in the list has saved, or what any has."""
    states = {mesh: state_on(mesh, num_experts) for mesh in meshes}
    saved = {mesh: save(root / named(mesh), tensors) for mesh, tensors in states.items()}
    expected = {mesh: copies(tensors) for mesh, tensors in states.items()}
    pairs = (
        [(a, b) for a in meshes for b in meshes] if every_pair else zip(meshes, meshes[1:] + meshes[:1], strict=True)
    )
    return {f"{a} -> {b}": wrongly_loaded(saved[a], states[b], expected[b]) for a, b in pairs}


@pytest.mark.parametrize(
    ("num_experts", "meshes"),
    [pytest.param(4, MESHES[4], marks=pytest.mark.slow), (2, [(1, 4, 1), (1, 4, 2)])],
    ids=["4 experts", "2 experts, cut along rows"],
)
@pytest.mark.parametrize("every_pair", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["chain", "every pair"])
def test_row3_meshes_of_4_ranks_load_each_other(
    tmp_path: Path, num_experts: int, meshes: list[Mesh], every_pair: bool
) -> None:
    for wrong in run_distributed(load_each_other, 4, tmp_path, meshes, num_experts, every_pair):
        assert len(wrong) == len(meshes) ** (2 if every_pair else 1)
        assert not any(wrong.values()), wrong


def load_all(root: Path, mesh: Mesh) -> dict[str, list[str]]:
    tensors = state_on(mesh)
    expected = copies(tensors)
    return {directory.name: wrongly_loaded(directory, tensors, expected) for directory in sorted(root.iterdir())}


def test_row3_saved_on_2_and_3_ranks_and_loaded_on_1_3_and_4(tmp_path: Path) -> None:
    run_distributed(save_on, 2, tmp_path / "2", (1, 2, 2))
    run_distributed(save_on, 3, tmp_path / "3", (1, 3, 1))
    worlds: list[Mesh] = [(1, 1, 1), (1, 3, 1), (2, 2, 2)]
    for mesh in worlds:
        size = mesh[0] * mesh[1]
        assert run_distributed(load_all, size, tmp_path, mesh) == [{"2": [], "3": []}] * size


def tensors() -> dict[str, Tensor]:
    return {"model/first": torch.arange(3000.0), "model/second": torch.arange(2000.0).view(50, 40).bfloat16()}


def test_values_are_converted_to_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, tensors(), STATE)
    read = {"model/second": torch.zeros(50, 40, dtype=torch.float64)}
    read_into(tmp_path, read)
    assert torch.equal(read["model/second"], tensors()["model/second"].double())


def test_tensors_that_are_not_contiguous_are_filled(tmp_path: Path) -> None:
    write(tmp_path, tensors(), STATE)
    read = {"model/second": torch.zeros(40, 50, dtype=torch.bfloat16).t(), "model/first": torch.zeros(6000)[::2]}
    read_into(tmp_path, read)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())


def test_shards_are_read_ahead_but_not_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first is delivered, the next are read; one more begins with each that is delivered."""
    wanted = {f"model/{number}": torch.full((5,), float(number)) for number in range(8)}
    write(tmp_path, wanted, STATE)
    begun: list[str] = []
    counts: list[int] = []
    ahead = threading.Event()
    read, deliver = ShardReader._read, _Loader._deliver

    def spy_read(self: ShardReader, shard: Wanted) -> Read:
        begun.append(shard.name)
        if len(begun) == AHEAD:
            ahead.set()
        return read(self, shard)

    def spy_deliver(self: _Loader, *args: Any) -> None:
        assert ahead.wait(30)
        counts.append(len(begun))
        deliver(self, *args)

    monkeypatch.setattr(ShardReader, "_read", spy_read)
    monkeypatch.setattr(_Loader, "_deliver", spy_deliver)
    filled = {name: torch.zeros(5) for name in wanted}
    read_into(tmp_path, filled)
    assert all(torch.equal(filled[name], tensor) for name, tensor in wanted.items())
    assert all(count <= number + AHEAD for number, count in enumerate(counts)), counts
    assert len(counts) == len(begun) == 8


def test_an_empty_tensor_is_no_problem(tmp_path: Path) -> None:
    write(tmp_path, {**tensors(), "model/none": torch.zeros(0, 3)}, STATE)
    read_into(tmp_path, {"model/none": torch.zeros(0, 3)})


def damage(directory: Path, tensor: str, how: str) -> Path:
    """Damage the file that holds ``tensor``."""
    metadata = read_metadata(directory)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == tensor)
    file: Path = directory / place.relative_path
    content = bytearray(file.read_bytes())
    middle = place.offset + place.length // 2
    if how == "one bit":
        content[middle] ^= 4
    elif how == "a zeroed page":
        content[middle : middle + 4096] = bytes(4096)
    elif how == "truncated":
        del content[middle:]
    file.write_bytes(content)
    if how == "deleted":
        file.unlink()
    return file


@pytest.mark.parametrize("how", ["one bit", "a zeroed page", "truncated", "deleted"])
def test_row8_row9_a_damaged_file_is_named_with_the_tensor(tmp_path: Path, how: str) -> None:
    write(tmp_path, tensors(), STATE)
    file = damage(tmp_path, "model/first", how)
    with pytest.raises(UserError, match=rf"{file}: .*model/first"):
        read_into(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in tensors().items()})


def test_row8_files_of_two_saves_are_told_apart(tmp_path: Path) -> None:
    for name, values in (("a", tensors()), ("b", {name: -tensor for name, tensor in tensors().items()})):
        (tmp_path / name).mkdir()
        write(tmp_path / name, values, STATE)
    for file in (tmp_path / "a").glob("*.distcp"):
        shutil.copy(tmp_path / "b" / file.name, file)
    with pytest.raises(UserError, match=r"a/.*\.distcp: .*differ from what was saved"):
        read_into(tmp_path / "a", tensors())


def refusal(directory: Path, absent: str | None) -> str:
    """Why this rank would not load."""
    wanted = state_on((1, 2, 1))
    if absent is not None:
        wanted[absent] = torch.zeros(3)
    with pytest.raises(UserError) as raised:
        read_into(directory, wanted)
    return str(raised.value)


def test_row8_every_rank_learns_what_one_rank_found(tmp_path: Path) -> None:
    """None is left waiting in the exchange, and the message is the same everywhere."""
    run_distributed(save_on, 2, tmp_path / "saved", (1, 2, 1))
    name = "model/layers.1.ffn.experts.gate_proj"
    file = damage(tmp_path / "saved", name, "one bit")
    messages = run_distributed(refusal, 2, tmp_path / "saved", None)
    assert f"{file}: " in messages[0]
    assert name in messages[0]
    assert messages[0] == messages[1]


def test_what_is_missing_is_named_on_every_rank(tmp_path: Path) -> None:
    run_distributed(save_on, 1, tmp_path / "saved", (1, 1, 1))
    message = f"{tmp_path / 'saved'} does not fit this model: model/absent: missing"
    assert run_distributed(refusal, 2, tmp_path / "saved", "model/absent") == [message, message]


def own_of_each(directory: Path) -> Tensor:
    """Each rank asks for what no other wants."""
    rank = dist.get_rank()
    own = {f"own/{rank}": torch.zeros(3)}
    read_into(directory, {"all": torch.zeros(2)}, own)
    return own[f"own/{rank}"]


def test_a_rank_may_have_tensors_of_its_own(tmp_path: Path) -> None:
    own = {f"own/{rank}": torch.full((3,), float(rank)) for rank in range(4)}
    write(tmp_path, {"all": torch.ones(2), **own}, STATE)
    assert [values.tolist() for values in run_distributed(own_of_each, 3, tmp_path)] == [
        [rank] * 3 for rank in range(3)
    ]
