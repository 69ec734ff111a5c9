"""Tokenizer files of Hugging Face directories: copies, and special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.json_files import read_json, refuse_lfs_pointer, write_json
from moefoundry.data.tokenizer import HF_FILES, INPUTS, declared_token, open_backend

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = {f"{token}_token": f"{token}_token_id" for token in ("bos", "eos", "pad")}
END = "eos_token_id"
PLAIN_CLASS = "PreTrainedTokenizerFast"  # which takes tokenizer.json as it stands
NEWER_CLASS = "TokenizersBackend"  # its name in transformers 5


def has_tokenizer(directory: Path) -> bool:
    """Tell if a directory has a vocabulary in any of the formats."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def check_importable(directory: Path) -> bool:
    """Tell if a Hugging Face directory has a tokenizer, and refuse one that cannot be read.

    Raises:
        UserError: It has one in a form that nothing here reads, or a file of it is unreadable.
    """
    if not has_tokenizer(directory):
        return False
    for name in HF_FILES:
        refuse_lfs_pointer(directory / name)
    if not (directory / "tokenizer.json").is_file():
        make = f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        raise UserError(f"{directory}: its tokenizer has no tokenizer.json; transformers makes one: {make}")
    open_backend(directory)
    return True


def import_tokenizer(hf: Path, target: Path) -> None:
    """Copy the tokenizer of a Hugging Face directory, and the end tokens that any of its files name."""
    copy_tokenizer(hf, target)
    special = special_token_ids(hf)
    if special and special != special_token_ids(target):
        _rewrite(target / GENERATION_CONFIG, _stated(target / GENERATION_CONFIG) | special)


def export_tokenizer(source: Path, hf: Path) -> dict[str, Any]:
    """Copy a tokenizer into a Hugging Face directory, in a form that transformers 4 and 5 read alike.

    Returns:
        Ids of its special tokens, for config.json.
    """
    copy_tokenizer(source, hf)
    special = special_token_ids(hf)
    generation = _stated(hf / GENERATION_CONFIG)
    complete = generation and generation.get(END) == special.get(END)
    _rewrite(hf / GENERATION_CONFIG, generation if complete else generation | special)
    if (hf / "tokenizer.json").is_file():
        _rewrite(hf / TOKENIZER_CONFIG, _portable(_stated(hf / TOKENIZER_CONFIG)))
    return special


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer; the target is made if there are any."""
    for name in HF_FILES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def special_token_ids(directory: Path) -> dict[str, Any]:
    """Read ``bos_token_id`` and the like: of generation_config.json, config.json and the tokenizer, the first counts.

    ``eos_token_id`` collects those of all three: an id, or a list where they name several, of which any ends a text.
    """
    found: dict[str, Any] = {}
    ends: list[int] = []
    for ids in (_stated(directory / GENERATION_CONFIG), _stated(directory / CONFIG), _tokenizers_ids(directory)):
        for key in SPECIAL_TOKENS.values():
            if ids.get(key) is not None:
                found.setdefault(key, ids[key])
        end = ids.get(END)
        ends += [token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)]
    if ends:
        unique = list(dict.fromkeys(ends))
        found[END] = unique if len(unique) > 1 else unique[0]
    return found


def end_token_ids(directory: Path) -> frozenset[int]:
    """Return the ids that end a text."""
    ends = special_token_ids(directory).get(END, [])
    return frozenset(ends if isinstance(ends, list) else [ends])


def _tokenizers_ids(directory: Path) -> dict[str, Any]:
    if not (directory / "tokenizer.json").is_file():
        return {}
    vocabulary = open_backend(directory)
    named = {key: declared_token(directory, token) for token, key in SPECIAL_TOKENS.items()}
    return {key: vocabulary.token_to_id(token) for key, token in named.items() if token is not None}


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Change a tokenizer_config.json into one that transformers 4 and 5 read alike."""
    portable = dict(config)
    if (config.get("tokenizer_class") or NEWER_CLASS) == NEWER_CLASS:
        portable["tokenizer_class"] = PLAIN_CLASS
    if isinstance(config.get("extra_special_tokens"), list):  # which transformers 4 takes for a mapping
        tokens = [*(config.get("additional_special_tokens") or []), *portable.pop("extra_special_tokens")]
        portable["additional_special_tokens"] = [token for i, token in enumerate(tokens) if token not in tokens[:i]]
    if "token_type_ids" in (config.get("model_input_names") or ["token_type_ids"]):
        portable["model_input_names"] = INPUTS
    return portable


def _stated(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _rewrite(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` to a JSON file; one that holds it already stays as it is to the last byte."""
    if not path.exists() or value != _stated(path):
        path.parent.mkdir(exist_ok=True)
        write_json(path, value)
