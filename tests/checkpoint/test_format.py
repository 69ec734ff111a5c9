"""Writing and reading one checkpoint: exact, by name, and without ever running what a file contains."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from moefoundry.checkpoint.format import METADATA_FILE
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_FILE, STATE_KEYS, read_state
from moefoundry.checkpoint.save import write
from moefoundry.checkpoint.weights import stored_shapes
from moefoundry.config import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STATE = dict.fromkeys(STATE_KEYS, 3)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model/weight": torch.randn(5, 3, generator=generator),
        "model/half": torch.randn(4, generator=generator).bfloat16(),
        "optimizer/weight/step": torch.tensor(7.0),
        "rng/0/torch": torch.arange(9, dtype=torch.uint8),
        "rng/0/numpy_gauss": torch.tensor(0.1, dtype=torch.float64),
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write(tmp_path, tensors(), STATE)
    return tmp_path


def test_round_trip_is_exact(checkpoint: Path) -> None:
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    read_into(checkpoint, read)
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor), name
    assert read_state(checkpoint) == STATE
    assert stored_shapes(checkpoint) == {name: tensor.shape for name, tensor in tensors().items()}


def test_a_part_can_be_read(checkpoint: Path) -> None:
    part = {"model/weight": torch.zeros(5, 3)}
    read_into(checkpoint, part)
    assert torch.equal(part["model/weight"], tensors()["model/weight"])


def test_missing_and_misshapen_tensors_are_named(checkpoint: Path) -> None:
    wanted = {"model/weight": torch.zeros(3, 5), "model/other": torch.zeros(2), "model/half": torch.zeros(4)}
    with pytest.raises(UserError) as raised:
        read_into(checkpoint, wanted)
    assert str(raised.value) == (
        f"{checkpoint} does not fit this model: model/weight: has shape (5, 3) there, (3, 5) here; model/other: missing"
    )
    assert not wanted["model/half"].any(), "nothing was read"


class Malice:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["whole file", "inside the metadata"])
def test_a_malicious_metadata_file_is_refused_unexecuted(checkpoint: Path, tmp_path: Path, where: str) -> None:
    proof = tmp_path / "executed"
    file = checkpoint / METADATA_FILE
    if where == "whole file":
        content: Any = Malice(proof)
    else:
        content = pickle.loads(file.read_bytes())
        content.planner_data = Malice(proof)
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"\.metadata: unreadable .*: posix\.system does not belong there; refused"):
        read_into(checkpoint, tensors())
    with pytest.raises(UserError, match="refused"):
        stored_shapes(checkpoint)
    assert not proof.exists()
    pickle.loads(file.read_bytes())
    assert proof.exists(), "it was malicious"


@pytest.mark.parametrize("name", ["_reconstruct", "eval", "load"])
def test_nothing_outside_the_list_is_loaded(checkpoint: Path, name: str) -> None:
    module = {"_reconstruct": "copy_reg", "eval": "builtins", "load": "torch"}[name]
    (checkpoint / METADATA_FILE).write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(UserError, match=rf"\w+\.{name} does not belong there; refused"):
        stored_shapes(checkpoint)


def test_an_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    """DCP would unpickle its bytes."""
    proof = tmp_path / "executed"
    dcp.save({"model/weight": torch.zeros(2), "extra": Malice(proof)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(UserError, match=r"\.metadata: .*BytesStorageMetadata does not belong there; refused"):
        stored_shapes(tmp_path)
    assert not proof.exists()


def test_a_forged_entry_is_refused(checkpoint: Path) -> None:
    file = checkpoint / METADATA_FILE
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["extra"] = "text"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata: .*: entry 'extra' is no tensor; refused"):
        stored_shapes(checkpoint)


def test_damaged_metadata_is_named(checkpoint: Path) -> None:
    file = checkpoint / METADATA_FILE
    for content in (b"", b"nonsense", file.read_bytes()[:-20], pickle.dumps(Metadata.__new__(Metadata))):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: unreadable checkpoint metadata"):
            stored_shapes(checkpoint)
    file.unlink()
    with pytest.raises(UserError, match=r"\.metadata: unreadable checkpoint metadata: .*No such file"):
        stored_shapes(checkpoint)


def test_state_that_lacks_something_is_named(checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).write_text('{"timestamp": {}, "data": {}}')
    with pytest.raises(UserError, match=r"state\.json: incomplete checkpoint state: it lacks world_size, recipe"):
        read_state(checkpoint)


@pytest.mark.parametrize("content", [b"", b'{"batch": 3', b"\xff\xfe", b"[" * 100_000, None], ids=range(5))
def test_damaged_state_is_named(checkpoint: Path, content: bytes | None) -> None:
    file = checkpoint / STATE_FILE
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: unreadable checkpoint state"):
        read_state(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (shard,) = checkpoint.glob("*.distcp")
    shard.unlink()
    with pytest.raises(UserError, match=re.escape(shard.name)):
        read_into(checkpoint, tensors())


def test_state_is_plain_json(checkpoint: Path) -> None:
    assert json.loads((checkpoint / STATE_FILE).read_text()) == STATE
