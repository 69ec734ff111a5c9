"""Random damage, from one bit to files of another save: what is read is what was saved, or an error names a file.

Every way of damage is applied to a copy, and every reader tried on it. Some of the damage comes with a manifest that
fits, as an attacker would make it: then data may be anything, but nothing may be run or read from outside.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_KEYS, Origin, read_state
from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.checkpoint.save import write
from moefoundry.config import UserError
from moefoundry.config.versions import FORMAT_VERSION
from tests.checkpoint.forge import recommit, verify_directory
from tests.checkpoint.test_format import Malice

FILES = ("__0_0.distcp", ".metadata", "state.json", "manifest.json", "COMMITTED")
STATES = [
    dict.fromkeys(STATE_KEYS, batch) | {"recipe": {"seed": batch, "format_version": FORMAT_VERSION}} for batch in (0, 1)
]


def tensors(save: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(save)
    return {"model/a": torch.randn(70, 30, generator=generator), "model/b": torch.randn(5, generator=generator)}


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one model."""
    root = tmp_path_factory.mktemp("saves")
    for save in (0, 1):
        (root / f"ba{save}").mkdir()
        write(root / f"ba{save}", tensors(save), STATES[save], Origin(save))
    return root


def flip(content: bytes, data: st.DataObject) -> bytes:
    damaged = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3), "positions"):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7), "bit")
    return bytes(damaged)


def zero(content: bytes, data: st.DataObject) -> bytes:
    start = data.draw(st.integers(0, len(content) - 1), "start")
    length = data.draw(st.sampled_from([1, 64, 512, 4096]), "length")
    return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]


def truncate(content: bytes, data: st.DataObject) -> bytes:
    return content[: data.draw(st.integers(0, len(content) - 1), "size")]


def extend(content: bytes, data: st.DataObject) -> bytes:
    return content + data.draw(st.binary(min_size=1, max_size=100), "more")


def edit_json(content: bytes, data: st.DataObject) -> bytes:
    try:
        document = json.loads(content)
    except ValueError:
        return flip(content, data)
    if not isinstance(document, dict):
        return b"{}"
    key = data.draw(st.sampled_from(sorted(document)), "key")
    value = data.draw(st.sampled_from([None, -1, 10**18, "../../x", [], {}, [[0, 10**15, "0"]], {"..": []}]), "value")
    return json.dumps(document | {key: value}).encode()


CHANGES: list[Callable[[bytes, st.DataObject], bytes]] = [flip, zero, truncate, extend, edit_json]


def damage(checkpoint: Path, other: Path, proof: Path, data: st.DataObject) -> bool:
    """Damage a checkpoint; whether its data may have been replaced by data whose hashes fit."""
    way = data.draw(st.sampled_from(["change", "swap", "delete", "plant", "forge"]), "way")
    file = data.draw(st.sampled_from(FILES), "file")
    path = checkpoint / file
    if way == "change":
        path.write_bytes(data.draw(st.sampled_from(CHANGES), "change")(path.read_bytes(), data))
    elif way == "swap":
        shutil.copyfile(other / file, path)
    elif way == "delete":
        path.unlink()
    elif way == "plant":
        path.write_bytes(pickle.dumps(Malice(proof)))
        if data.draw(st.booleans(), "committed") and file in FILES[:3]:
            recommit(checkpoint)
    else:
        file = data.draw(st.sampled_from(FILES[:3]), "forged")
        path = checkpoint / file
        path.write_bytes(data.draw(st.sampled_from(CHANGES), "change")(path.read_bytes(), data))
        recommit(checkpoint)
        return True
    return False


def read_all(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = read_state(checkpoint)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    read_into(checkpoint, read)
    return state, read


def read_blocks(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    stored = StoredTensors(checkpoint)
    return read_state(checkpoint), {name: stored.read(name) for name in stored.specs}


def read_nothing(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    verify_directory(checkpoint)
    return STATES[0], tensors(0)


def check(saves: Path, data: st.DataObject) -> None:
    checkpoint, proof = saves / "damaged", saves / "executed"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(saves / "ba0", checkpoint)
    intact = {file: (checkpoint / file).read_bytes() for file in FILES}
    forged = damage(checkpoint, saves / "ba1", proof, data)
    changed = any(not (checkpoint / f).exists() or (checkpoint / f).read_bytes() != intact[f] for f in FILES)
    for read in (read_all, read_blocks, read_nothing):
        try:
            state, values = read(checkpoint)
        except UserError as raised:
            refusal = str(raised)
        else:
            refusal = None
        if refusal is not None:
            assert changed
            assert refusal.startswith(str(checkpoint)), "it names where"
            assert "weights_only" not in refusal, "torch's advice to load it without restriction"
        elif not forged:
            assert state == STATES[0]
            assert values.keys() == tensors(0).keys()
            assert all(torch.equal(values[name], tensor) for name, tensor in tensors(0).items())
    assert not proof.exists(), "something was run"


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=50, derandomize=True, database=None, **COMMON)
@given(data=st.data())
def test_damage_is_never_loaded_in_silence(saves: Path, data: st.DataObject) -> None:
    check(saves, data)


@pytest.mark.slow
@settings(max_examples=500, database=None, **COMMON)
@given(data=st.data())
def test_much_damage_is_never_loaded_in_silence(saves: Path, data: st.DataObject) -> None:
    check(saves, data)
