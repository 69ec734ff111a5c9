"""Directories of safetensors: what is written, the safetensors library reads, and the other way round."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.config import UserError
from moefoundry.conversion.safetensors_io import (
    DTYPE_NAMES,
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsReader,
    write_file,
    write_safetensors,
)
from tests.conversion.hf import from_fp8, to_fp8, to_int4


def tensors() -> dict[str, Tensor]:
    """Of every dtype that can be stored; of 0 to 3 dims; narrow ones first, and of odd length."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (3, 5), generator=generator)
    return {
        **{f"kind.{name}": values.to(dtype) for dtype, name in reversed(DTYPE_NAMES.items())},
        "scalar": torch.tensor(3.5),
        "cube": torch.randn(2, 3, 4, generator=generator).bfloat16(),
    }


def specs_of(values: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()}


def rows_of(values: dict[str, Tensor], name: str) -> Iterator[Tensor]:
    """The tensor in one piece for each row."""
    return iter(values[name].split(1) if values[name].dim() else [values[name]])


def assert_equal(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read[name].float(), tensor.float()), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    values = tensors()
    write_file(tmp_path / "file.safetensors", specs_of(values), lambda name: rows_of(values, name))
    assert_equal(load_file(tmp_path / "file.safetensors"), values)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    values = {name: tensor for name, tensor in tensors().items() if "F8" not in name}
    save_file(values, tmp_path / SINGLE_FILE)
    reader = SafetensorsReader(tmp_path)
    assert reader.specs == specs_of(values)
    assert_equal({name: reader.read(name) for name in values}, values)
    assert torch.equal(reader.read("cube", (1, 2)), values["cube"][1:2])
    assert torch.equal(reader.read("cube", (0, 2), (1, 3)), values["cube"][:, 1:3])


def test_shards_are_no_larger_than_allowed(tmp_path: Path) -> None:
    values = {f"t{index}": torch.full((size,), float(index)) for index, size in enumerate([10, 10, 50, 1, 19])}
    write_safetensors(tmp_path, specs_of(values), lambda name: rows_of(values, name), max_shard_bytes=80)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 4 * 90}
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["weight_map"] == dict(zip(values, [files[0], files[0], files[1], files[2], files[2]], strict=True))
    assert_equal({name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}, values)
    reader = SafetensorsReader(tmp_path)
    assert_equal({name: reader.read(name) for name in reader.specs}, values)


@pytest.mark.parametrize("blocks", [[torch.zeros(2)], [torch.zeros(3).half()], [torch.zeros(3), torch.zeros(1)]])
def test_blocks_that_are_not_the_tensor_are_an_error(tmp_path: Path, blocks: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="weight: "):
        write_file(tmp_path / "f", {"weight": TensorSpec((3,), torch.float32)}, lambda _: blocks)


# ------------------------------------------------------------------------------------------------------------------ FP8


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (1, 127), (257, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_read_as_what_they_stand_for(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:, 100:] *= 50  # so that neighbouring blocks have different factors
    values, scales = to_fp8(weight)
    save_file({"w.weight": values, "w.weight_scale_inv": scales, "other": torch.ones(2)}, tmp_path / SINGLE_FILE)
    reader = SafetensorsReader(tmp_path, fp8_as=dtype)
    assert reader.specs == {"w.weight": TensorSpec(shape, dtype), "other": TensorSpec((2,), torch.float32)}
    expected = from_fp8(values, scales).to(dtype)
    torch.testing.assert_close(expected.float(), weight, rtol=0.07, atol=0.3)  # the helpers are right
    assert torch.equal(reader.read("w.weight"), expected)
    rows, columns = (shape[0] // 3, shape[0]), (shape[1] // 2, shape[1] - 1)
    assert torch.equal(reader.read("w.weight", rows), expected[slice(*rows)])
    assert torch.equal(reader.read("w.weight", rows, columns), expected[slice(*rows), slice(*columns)])


def test_fp8_blocks_of_another_size(tmp_path: Path) -> None:
    values, scales = torch.ones(3, 4).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / SINGLE_FILE)
    read = SafetensorsReader(tmp_path, fp8_block=(2, 3)).read("w")
    assert read.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]


def test_fp8_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    values = torch.ones(130, 4).to(torch.float8_e4m3fn)
    bad = {"a": values, "b": values.clone(), "b_scale_inv": torch.ones(1, 1), "c": values.to(torch.float8_e5m2)}
    save_file({**bad, "good": values.clone(), "good_scale_inv": torch.ones(2, 1)}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError) as raised:
        SafetensorsReader(tmp_path)
    assert "a (torch.float8_e4m3fn (130, 4)) has no _scale_inv; (2, 1) is needed" in str(raised.value)
    assert "b (torch.float8_e4m3fn (130, 4)) has a torch.float32 (1, 1) _scale_inv; (2, 1) is needed" in str(
        raised.value
    )
    assert "c (torch.float8_e5m2" in str(raised.value)
    assert "good" not in str(raised.value)


# ------------------------------------------------------------------------------------------------- what must be refused


def test_packed_int4_by_hand(tmp_path: Path) -> None:
    """Eight columns in an int32, the first in the lowest bits, 8 added: 0x76543210 is -8 to -1."""
    packed = torch.tensor([[0x76543210], [0xFEDCBA98 - 2**32]], dtype=torch.int32)
    tensors = {
        "a.weight_packed": packed,
        "a.weight_scale": torch.tensor([[0.5, 2.0], [1.0, 1.0]]).bfloat16(),
        "a.weight_shape": torch.tensor([2, 8]),
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    reader = SafetensorsReader(tmp_path)
    assert reader.specs == {"a.weight": TensorSpec((2, 8), torch.bfloat16)}
    assert reader.read("a.weight").tolist() == [[-4, -3.5, -3, -2.5, -8, -6, -4, -2], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert reader.read("a.weight", (1, 2), (2, 5)).tolist() == [[2, 3, 4]]


@pytest.mark.parametrize(("shape", "group"), [((5, 96), 32), ((3, 20), 4), ((1, 12), 12)])
def test_packed_int4_is_read_as_what_it_stands_for(tmp_path: Path, shape: tuple[int, int], group: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts, expected = to_int4(weight, group)
    save_file({f"a.weight{end}": tensor for end, tensor in parts.items()}, tmp_path / SINGLE_FILE)
    reader = SafetensorsReader(tmp_path, fp8_as=torch.float32)
    assert torch.equal(reader.read("a.weight"), expected)
    assert torch.equal(reader.read("a.weight", (0, 1)), expected[:1])
    assert (expected - weight).abs().max() < 0.3


def test_packed_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = {"a.weight_scale": torch.ones(2, 3), "a.weight_shape": torch.tensor([2, 8])}
    packed = {"a.weight_packed": torch.zeros(2, 1, dtype=torch.int32)}
    save_file(packed | whole, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=r"INT4 tensors that cannot be read:\n  a\.weight \(2, 8\) does not fit"):
        SafetensorsReader(tmp_path)
    save_file(packed, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=r"a\.weight: weight_scale \[O, groups\] and weight_shape \[2\] must be beside"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(UserError, match=rf"holds pickled weights \({re.escape(name)}\), which could run any code"):
        SafetensorsReader(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/tmp/secret.safetensors", "a/../../secret.safetensors"])
def test_paths_that_leave_the_directory_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "hf" / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": path}}))
    with pytest.raises(UserError, match=rf"files outside the directory are refused: {re.escape(path)}"):
        SafetensorsReader(tmp_path / "hf")


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shards_and_tensors_are_all_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    with pytest.raises(UserError, match=r"shards of the index are missing: 2\.safetensors, 3\.safetensors"):
        SafetensorsReader(tmp_path)
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"})
    with pytest.raises(UserError, match="tensors of the index are missing: b, c"):
        SafetensorsReader(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in "12":
        save_file({"a": torch.zeros(1), number: torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "2": "2.safetensors"})
    with pytest.raises(UserError, match=r"2\.safetensors: a is in another shard, too"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match=rf"{INDEX_FILE}: unreadable index"):
        SafetensorsReader(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    for size in (0, 4, 50, len(content) - 1):
        (tmp_path / SINGLE_FILE).write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"{SINGLE_FILE}: unreadable safetensors"):
            SafetensorsReader(tmp_path)


def test_a_variant_is_read_where_it_is_the_only_one(tmp_path: Path) -> None:
    values = {"weight": torch.arange(6.0).view(2, 3)}
    save_file(values, tmp_path / "model.fp16.safetensors")
    assert torch.equal(SafetensorsReader(tmp_path).read("weight"), values["weight"])
    index = {"weight_map": {"weight": "model.fp16.safetensors"}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"several variants of the weights: model.fp16.safetensors, "):
        SafetensorsReader(tmp_path)
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "part.safetensors")
    index["weight_map"]["weight"] = "part.safetensors"
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert torch.equal(SafetensorsReader(tmp_path).read("weight"), values["weight"])
