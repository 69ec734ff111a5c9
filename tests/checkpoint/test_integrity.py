"""Damaged, mixed up and malicious checkpoints are refused by name, never run and never half believed."""

import errno
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import COMMIT_FILE, STATE_KEYS, Origin, read_state
from moefoundry.checkpoint.manifest import damage as everywhere
from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.checkpoint.run_dir import newest_intact
from moefoundry.checkpoint.save import write
from moefoundry.checkpoint.store import CheckpointStore, entries
from moefoundry.cli.main import main
from moefoundry.config import Recipe, UserError
from tests.checkpoint.forge import recommit, verify_directory
from tests.checkpoint.test_format import Malice
from tests.train.runs import run_recipe

STATE = dict.fromkeys(STATE_KEYS, 3) | {"recipe": {"seed": 1}}
DATA = "__0_0.distcp"


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"model/a": torch.randn(60, 50, generator=generator), "model/b": torch.randn(9, generator=generator)}


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Checkpoints of batches 2, 4 and 6."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for batch in (2, 4, 6):
        write(store.begin(batch), tensors(batch), STATE, Origin(batch, {"replicate": 1, "shard": 1, "expert": 1}))
        store.publish(batch)
    return store


def flip_a_bit(checkpoint: Path) -> str:
    content = bytearray((checkpoint / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / DATA).write_bytes(content)
    return DATA


def zero_a_page(checkpoint: Path) -> str:
    content = bytearray((checkpoint / DATA).read_bytes())
    content[4096:8192] = bytes(4096)
    (checkpoint / DATA).write_bytes(content)
    return DATA


def mix_two_saves(checkpoint: Path) -> str:
    shutil.copyfile(checkpoint.parent / "ba2" / DATA, checkpoint / DATA)
    return DATA


def mix_index(checkpoint: Path) -> str:
    other = checkpoint.parent / "other"
    other.mkdir()
    write(other, {"model/a": torch.zeros(60, 50), "model/b": torch.zeros(9), "c": torch.zeros(2)}, STATE)
    shutil.copyfile(other / ".metadata", checkpoint / ".metadata")
    return ".metadata"


def delete_a_file(checkpoint: Path) -> str:
    (checkpoint / DATA).unlink()
    return DATA


def truncate_a_file(checkpoint: Path) -> str:
    content = (checkpoint / DATA).read_bytes()
    (checkpoint / DATA).write_bytes(content[:-3000])
    return DATA


def lose_the_marker(checkpoint: Path) -> str:
    (checkpoint / COMMIT_FILE).unlink()
    return COMMIT_FILE


ROW_8 = [flip_a_bit, zero_a_page, mix_two_saves, mix_index]
ROW_9 = [delete_a_file, truncate_a_file]


@pytest.mark.parametrize("damage", [*ROW_8, *ROW_9, lose_the_marker])
def test_rows_8_and_9_damage_is_named_by_every_reader(store: CheckpointStore, damage: Callable[[Path], str]) -> None:
    checkpoint = store.path(6)
    file = damage(checkpoint)
    pattern = rf"^{re.escape(str(checkpoint))}/{re.escape(file)}: "
    with pytest.raises(UserError, match=pattern):
        verify_directory(checkpoint)
    with pytest.raises(UserError, match=pattern):
        read_into(checkpoint, zeros())
    with pytest.raises(UserError, match=pattern):
        StoredTensors(checkpoint).read("model/a")


@pytest.mark.parametrize("damage", [*ROW_8, *ROW_9, lose_the_marker])
def test_rows_8_and_9_the_newest_intact_one_is_found(
    store: CheckpointStore, capsys: pytest.CaptureFixture, damage: Callable[[Path], str]
) -> None:
    file = damage(store.path(6))
    damage(store.path(4)) if damage is not mix_index else None
    good = 4 if damage is mix_index else 2
    assert newest_intact(store, sizes_only=False) == store.path(good)
    warning = capsys.readouterr().err
    assert f"warning: {store.path(6)} is damaged and now called ba6.quarantine-0:\n" in warning
    assert f"{store.path(6)}/{file}: " in warning
    assert [batch for batch in store.claimed() if batch > good] == []
    assert newest_intact(store, sizes_only=False) == store.path(good)
    assert capsys.readouterr().err == "", "said once"


def test_where_all_are_damaged_nothing_starts_anew(store: CheckpointStore) -> None:
    for batch in store.batches():
        flip_a_bit(store.path(batch))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged:(\n  ba\d/__0_0.distcp: .*){3}\n  bring"):
        newest_intact(store, sizes_only=False)
    assert store.claimed() == [2, 4, 6]


@pytest.mark.parametrize("damage", [*ROW_9, lose_the_marker])
def test_row9_sizes_and_the_marker_need_no_reading(store: CheckpointStore, damage: Callable[[Path], str]) -> None:
    file = damage(store.path(6))
    assert [line.split(": ")[0] for line in everywhere(store.path(6), sizes_only=True)] == [f"{store.path(6)}/{file}"]
    assert everywhere(store.path(4), sizes_only=True) == []


@pytest.mark.parametrize(("world_size", "damage"), [(1, truncate_a_file), (2, flip_a_bit)])
def test_rows_7_and_8_a_run_falls_back_and_reaches_the_same_batch_again(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, world_size: int, damage: Callable[[Path], str]
) -> None:
    """Before it loads, or, where the damage shows only then, when it has loaded a part."""
    steps = ("max_duration=6ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1", "autoresume=true")
    recipe = tiny_recipe(tmp_path, *steps)
    whole = run_recipe(recipe, world_size)
    newest = whole.run_dir / "checkpoints" / "ba6"
    file = damage(newest)
    again = run_recipe(recipe, world_size)
    assert f"warning: {newest} is damaged and now called ba6.quarantine-0:\n  {newest}/{file}: " in again.err
    assert again.checkpoints() == ["ba2", "ba4", "ba6", "ba6.quarantine-0"]
    assert again.exact() == whole.exact()
    verify_directory(newest)


@pytest.mark.parametrize("where", ["block", "metadata", "state"])
def test_row10_malice_is_refused_even_where_the_hashes_fit(store: CheckpointStore, tmp_path: Path, where: str) -> None:
    checkpoint, proof = store.path(6), tmp_path / "executed"
    if where == "block":
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        torch.save([Malice(proof), "x" * 20_000], checkpoint / DATA)  # as long as the tensor
        for place in metadata.storage_data.values():
            vars(place).update(offset=0, length=(checkpoint / DATA).stat().st_size)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        named, refusal = DATA, r"posix\.system does not belong there; refused"
    elif where == "metadata":
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        metadata.planner_data = Malice(proof)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        named, refusal = ".metadata", r"posix\.system does not belong there; refused"
    else:
        (checkpoint / "state.json").write_bytes(pickle.dumps(Malice(proof)))
        named, refusal = "state.json", "unreadable checkpoint state"
    recommit(checkpoint)
    verify_directory(checkpoint)
    pattern = rf"^{re.escape(str(checkpoint))}/{re.escape(named)}: .*({refusal})"
    for read in (
        lambda: (read_state(checkpoint), read_into(checkpoint, zeros())),
        lambda: (read_state(checkpoint), StoredTensors(checkpoint).read("model/a")),
    ):
        with pytest.raises(UserError, match=pattern) as raised:
            read()
        assert "weights_only" not in str(raised.value), "torch's advice to load it without restriction"
    assert not proof.exists()


@pytest.mark.parametrize(
    "forged",
    [
        {"offset": 10**12},
        {"length": 10**15},
        {"offset": -64},
        {"relative_path": "../ba2/x"},
        {"relative_path": "state.json"},
    ],
    ids=str,
)
def test_row10_places_outside_the_files_are_refused(store: CheckpointStore, forged: dict[str, Any]) -> None:
    """Before anything of that size is allocated, and whatever else lies on the disk."""
    checkpoint = store.path(6)
    shutil.copyfile(checkpoint / DATA, store.path(2) / "x")
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        vars(place).update(forged)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    recommit(checkpoint)
    for read in (lambda: read_into(checkpoint, zeros()), lambda: StoredTensors(checkpoint).read("model/a")):
        with pytest.raises(UserError, match=re.escape(str(checkpoint))):
            read()


def test_the_command(store: CheckpointStore, capsys: pytest.CaptureFixture) -> None:
    run = str(store.root.parent)

    def said(*arguments: str) -> tuple[int, str, str]:
        status = main(["checkpoint", *arguments])
        return (status, *capsys.readouterr())

    status, out, _ = said("verify", run)
    assert (status, out.count(": intact")) == (0, 3)
    flip_a_bit(store.path(4))
    status, out, _ = said("verify", run)
    assert status == 1
    assert f"{store.path(4)}/{DATA}: offset " in out
    assert said("verify", str(store.path(6)))[0] == 0

    store.quarantine(4)
    store.begin(8)
    status, out, _ = said("list", run)
    rows = [re.split(r"  +", line) for line in out.splitlines()[1:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("ba2", "committed"),
        ("ba4.quarantine-0", "quarantined"),
        ("ba6", "committed"),
        ("ba8.incomplete", "not committed"),
    ]
    assert "replicate 1, shard 1, expert 1" in rows[0]

    status, out, _ = said("show", run)
    assert status == 0
    assert f"{store.path(6)}: batch 6, saved at " in out
    assert f"torch {torch.__version__}" in out
    assert "\n  model/a  float32 [60, 50]\n" in out

    assert said("delete", run, "--step", "6") == (2, "", f"error: this deletes {store.path(6)}; say --yes\n")
    assert said("delete", run, "--batch", "6", "--yes")[0] == 0
    assert said("delete", str(store.root / "ba4.quarantine-0"), "--yes")[0] == 0
    assert [path.name for path in entries(store.root)] == ["ba2", "ba8.incomplete"]

    imported = store.path(2).rename(store.root.parent / "imported")  # a checkpoint of no run
    status, out, _ = said("list", str(imported))
    assert [re.split(r"  +", line)[0] for line in out.splitlines()[1:]] == ["imported"]
    assert said("verify", str(imported)) == (0, f"{imported}: intact\n", "")
    assert said("delete", str(imported)) == (2, "", f"error: this deletes {imported}; say --yes\n")
    assert said("delete", str(imported), "--yes")[0] == 0
    assert not imported.exists()


def test_what_cannot_be_shown_or_deleted_is_named_by_its_path(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(path: Path) -> None:  # as rmtree does, which opens directories below one another
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "state.json")

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert main(["checkpoint", "delete", str(store.path(2)), "--yes"]) == 2
    assert capsys.readouterr().err == f"error: {store.path(2)}: cannot be deleted: Permission denied\n"
    (store.root / "none").mkdir()
    assert main(["checkpoint", "show", str(store.root / "none")]) == 2
    assert capsys.readouterr().err == f"error: {store.root}/none: no complete checkpoint there\n"


@pytest.mark.parametrize("action", ["list", "show", "verify"])
def test_the_command_ends_quietly_where_nobody_reads_on(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:  # as the interpreter does at its end, closing flushes what is left
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["checkpoint", action, str(store.root.parent)]) == 141


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["list", "{0}/nowhere"], "{0}/nowhere: no such directory"),
        (["list", "{0}"], "{0}: no checkpoints there"),
        (["verify", "{0}"], "{0}: no checkpoints there"),
        (["delete", "{0}", "--yes"], "{0}: no checkpoint; name one, or --batch of a run"),
    ],
)
def test_the_command_has_one_line_for_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], error: str
) -> None:
    assert main(["checkpoint", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert capsys.readouterr() == ("", f"error: {error.format(tmp_path)}\n")
