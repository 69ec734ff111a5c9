"""MXFP4: values by hand, and what is incomplete. The transformers of today is compared in ``test_transformers5.py``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moefoundry.config import UserError
from moefoundry.conversion.mxfp4 import dequantize
from moefoundry.conversion.safetensors_io import SafetensorsReader
from tests.conversion.hf import packed_mxfp4

NAME = "model.layers.0.mlp.experts.down_proj"


def write(directory: Path, blocks: Tensor | None, scales: Tensor | None) -> SafetensorsReader:
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, "other": torch.zeros(2)}
    save_file({name: t for name, t in tensors.items() if t is not None}, directory / "model.safetensors")
    return SafetensorsReader(directory)


def test_values_by_hand() -> None:
    """Each code once, the lower half of a byte first; factors 2 and 2**-3, in blocks of 32 along the input."""
    codes = torch.arange(32) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).expand(1, 2, 2, 16)
    scales = torch.tensor([[[128, 124], [127, 127]]], dtype=torch.uint8)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).repeat(2)
    expected = torch.stack([torch.cat([table * 2, table / 8]), torch.cat([table, table])], dim=1)[None]
    found = dequantize(blocks, scales)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())
    assert torch.equal(found.bfloat16().float(), found), "exact in BF16"


def test_every_factor_is_exact_in_bf16() -> None:
    blocks = torch.full((1, 1, 255, 16), 0x71, dtype=torch.uint8)  # 0.5 and 6
    found = dequantize(blocks, torch.arange(255, dtype=torch.uint8).view(1, 1, 255))[0, :, 0]
    assert found[0].item() == 2.0**-128
    assert torch.equal(found.bfloat16().float(), found.bfloat16().double().float())
    assert (found.bfloat16().double()[::2] == 0.5 * 2.0 ** torch.arange(-127, 128).repeat_interleave(16)).all()


def test_parts_are_read_as_parts_of_the_weight(tmp_path: Path) -> None:
    blocks, scales = packed_mxfp4(3, 5, 64)
    reader = write(tmp_path, blocks, scales)
    assert set(reader.specs) == {NAME, "other"}
    assert reader.specs[NAME] == ((3, 64, 5), torch.bfloat16)
    whole = reader.read(NAME)
    assert torch.equal(whole, dequantize(blocks, scales).bfloat16())
    assert torch.equal(reader.read(NAME, (1, 3), (2, 40)), whole[1:3, 2:40])
    assert torch.equal(reader.read(NAME, (1, 2), (2, 40), (0, 4)), whole[1:2, 2:40, :4])


@pytest.mark.parametrize(
    ("blocks", "scales", "reason"),
    [
        ((2, 5, 3, 16), None, r"_blocks \(2, 5, 3, 16\) has no down_proj_scales; uint8 \(2, 5, 3\) is needed"),
        ((2, 5, 3, 16), (2, 5, 4), r"has a torch.uint8 \(2, 5, 4\) down_proj_scales; uint8 \(2, 5, 3\) is needed"),
        ((2, 5, 3, 8), (2, 5, 3), r"_blocks has the shape \(2, 5, 3, 8\), not \[experts, outputs, groups, 16\]"),
    ],
)
def test_what_is_incomplete_is_named(tmp_path: Path, blocks: tuple, scales: tuple | None, reason: str) -> None:
    parts = [None if shape is None else torch.zeros(shape, dtype=torch.uint8) for shape in (blocks, scales)]
    with pytest.raises(UserError, match=rf"MXFP4 tensors that cannot be read:\n  {NAME}.*{reason}"):
        write(tmp_path, *parts)
