"""The config of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.config import UserError
from moefoundry.data.json_files import read_json
from moefoundry.data.tokenizer_files import CONFIG


def read_hf_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory.

    Raises:
        UserError: The directory or the file is missing, or it is no JSON object.
    """
    if not path.is_dir():
        download = f"huggingface-cli download ORGANIZATION/{path.name} --local-dir {path}"
        raise UserError(f"{path}: no such directory; a model is downloaded first: {download}")
    return read_json(path / CONFIG)


def fp8_block(config: dict[str, Any], path: Path) -> tuple[int, int]:
    """Rows and columns of an FP8 block; those that DeepSeek publishes where no weight is quantized.

    Raises:
        UserError: Weights are quantized in another way.
    """
    quantization = config.get("quantization_config") or {"quant_method": "fp8", "weight_block_size": [128, 128]}
    match quantization:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]}:
            return rows, columns
    raise UserError(f"{path / CONFIG}: only FP8 weights in blocks can be read, not quantization_config {quantization}")
