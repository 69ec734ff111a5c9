"""What lies beside the tensors of a Hugging Face directory: its config, and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moefoundry.config import UserError
from moefoundry.data.tokenizer import HF_FILES

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer"
TOKENIZER_FILES = (*HF_FILES, GENERATION_CONFIG)  # which names the same special tokens
SPECIAL_TOKENS = {f"{token}_token": f"{token}_token_id" for token in ("bos", "eos", "pad")}


def read_hf_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory.

    Raises:
        UserError: The directory or the file is missing, or it is no JSON object.
    """
    if not path.is_dir():
        download = f"huggingface-cli download ORGANIZATION/{path.name} --local-dir {path}"
        raise UserError(f"{path}: no such directory; a model is downloaded first: {download}")
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG}: unreadable: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG}: not a JSON object")
    return config


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


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a vocabulary in any of the formats."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into a directory, made if need be."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def tokenizer_of(checkpoint: Path, recipe: dict[str, Any]) -> Path | None:
    """Where a checkpoint's tokenizer should be: its own, or else that of its run; None where it has neither."""
    if (checkpoint / TOKENIZER).is_dir():
        return checkpoint / TOKENIZER
    name = recipe.get("tokenizer.name")
    return None if name is None else Path(name)


def special_token_ids(directory: Path) -> dict[str, Any]:
    """``bos_token_id`` and so on, as generation_config.json says, or else the tokenizer; empty without either."""
    if (directory / GENERATION_CONFIG).is_file():
        generation = json.loads((directory / GENERATION_CONFIG).read_text())
        return {key: generation[key] for key in SPECIAL_TOKENS.values() if key in generation}
    if not all((directory / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return {}
    tokens = json.loads((directory / "tokenizer_config.json").read_text())
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = {}
    for token, key in SPECIAL_TOKENS.items():
        text = tokens.get(token)
        text = text["content"] if isinstance(text, dict) else text
        if text is not None:
            found[key] = vocabulary.token_to_id(text)
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face does."""
    path.write_text(json.dumps(value, indent=2) + "\n")
