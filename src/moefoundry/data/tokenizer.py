"""Tokenizers: a byte-level BPE that is trained, or a given one; both end as a Hugging Face directory.

Byte-level BPE (GPT-2's scheme): text is split into words, spaces and punctuation, every byte is a letter of the
initial alphabet, and merges are learned on top. Any text round-trips exactly and nothing is ever unknown.

Special tokens take the first ids. The fill-in-the-middle ones are reserved even where training does not use them yet,
so that a model trained today keeps its vocabulary.

Only the ``tokenizers`` library is used: ``transformers`` takes seconds to import and reads the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from moefoundry.config.errors import UserError
from moefoundry.data.pieces import PieceEncoder
from moefoundry.data.workers import PARALLELISM, available_cores

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
FIM_TOKENS = ("<fim_begin>", "<fim_hole>", "<fim_end>")
SPECIAL_TOKENS = (EOS_TOKEN, PAD_TOKEN, *FIM_TOKENS)
LONGEST_RUN = 256  # characters; no useful token is longer
LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)  # every byte, every special token, no merge

MANY_CORES = 5  # as many threads of the library are as fast as one that remembers pieces
# Files of a Hugging Face tokenizer directory; the first is the one that is read here.
HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",  # which names further end tokens
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
)
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys of them that change no token: about chat templates, which are told apart by themselves, and about showing,
# cutting and padding text, files and classes of other tools.
WITHOUT_EFFECT = frozenset(
    {
        *("chat_template", "model_max_length", "max_length", "max_len", "stride", "truncation", "truncation_side"),
        *("truncation_strategy", "padding", "padding_side", "pad_to_multiple_of", "pad_token_type_id"),
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors", "verbose"),
        *("name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file", "auto_map", "processor_class"),
        *("model_input_names", "return_token_type_ids", "transformers_version", "backend", "is_local", "device_map"),
    }
)
INPUTS = ["input_ids", "attention_mask"]  # what a model takes; transformers adds token_type_ids unless told


@dataclass(frozen=True)
class TextTokenizer:
    """Tokenizer with the facts that preparation needs.

    Attributes:
        backend: The ``tokenizers`` object.
        vocab_size: Rows an embedding needs: one more than the largest id (ids may have gaps).
        eos_token, eos_id: The end-of-text token.
        files: File name -> content of its Hugging Face directory.
    """

    backend: Tokenizer
    vocab_size: int
    eos_token: str
    eos_id: int
    files: dict[str, bytes]

    @property
    def sha256(self) -> str:
        """Digest of tokenizer.json, which alone decides how text is cut here."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    @property
    def settings_sha256(self) -> str:
        """Digest of what else decides the tokens that transformers makes; see :func:`settings_digest`."""
        return settings_digest(self.files)

    @property
    def unknown_id(self) -> int | None:
        """Id of the token that stands for unknown text; None if there is none, or it is also the end-of-text token."""
        model = json.loads(self.files["tokenizer.json"])["model"]
        token = model.get("unk_token")
        unknown: int | None = model.get("unk_id") if token is None else self.backend.token_to_id(token)
        return None if unknown == self.eos_id else unknown

    @cached_property
    def _pieces(self) -> PieceEncoder | None:
        return PieceEncoder.of(self.backend, json.loads(self.files["tokenizer.json"]))

    def encode_batch(self, texts: Sequence[str], *, ended: bool = False) -> list[NDArray[np.uint32]]:
        """Encode texts, [N] each. No special token is read out of a text.

        Args:
            texts: The texts.
            ended: Put the end-of-text token behind each; no other is added.
        """
        end = array("I", [self.eos_id] * ended).tobytes()
        pieces = self._pieces if _has_one_thread() else None
        found = [None if pieces is None else pieces.encode(text, end) for text in texts]
        rest = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        encodings = iter(self.backend.encode_batch_fast(rest, add_special_tokens=False))
        return [
            np.frombuffer(array("I", next(encodings).ids).tobytes() + end, np.uint32) if tokens is None else tokens
            for tokens in found
        ]

    def save(self, directory: Path) -> None:
        """Write the Hugging Face files into a new directory."""
        directory.mkdir(parents=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


def settings_files(directory: Path) -> dict[str, bytes]:
    """Read the files beside tokenizer.json that :func:`settings_digest` is of; those that are there."""
    return {name: (directory / name).read_bytes() for name in SETTINGS_FILES if (directory / name).is_file()}


def settings_digest(files: Mapping[str, bytes]) -> str:
    """Compute the SHA-256, in hex, of what files beside tokenizer.json say of tokens: special ones, prefixes, classes.

    Raises:
        UserError: One of the files is no JSON object.
    """
    read = {}
    for name in SETTINGS_FILES:
        try:
            read[name] = dict(json.loads(files.get(name, b"{}")))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{name} of the tokenizer: not a JSON object: {error}") from error
    config, special, added = read.values()
    settings = {key: value for key, value in {**special, **config}.items() if key not in WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps([settings, added], sort_keys=True).encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Learn a byte-level BPE.

    Args:
        texts: The sample to learn from; read once, not kept.
        vocab_size: Largest vocabulary; a small sample may yield fewer merges.

    Raises:
        UserError: ``vocab_size`` does not hold the bytes and the special tokens.
    """
    check_trainable(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(map(cut_long_runs, texts), trainer)
    tokens = {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
    special = {**tokens, "additional_special_tokens": list(FIM_TOKENS)}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": INPUTS,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _to_json(config),
        "special_tokens_map.json": _to_json(special),
    }
    return _for_plain_text(backend, EOS_TOKEN, files)


def cut_long_runs(text: str) -> str | list[str]:
    """Cut a text so that no piece has a run of more than :data:`LONGEST_RUN` blanks, or of as many other characters.

    A run is one word to learn merges from, and that takes time in the square of its length.
    """
    cuts = [0, *(run.end() for run in LONG_RUN.finditer(text)), len(text)]
    return text if len(cuts) == 2 else [text[start:end] for start, end in pairwise(cuts)]


def check_trainable(vocab_size: int) -> None:
    """Check the size of a vocabulary to be learned.

    Raises:
        UserError: It does not hold the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"vocab_size={vocab_size}: at least {SMALLEST_VOCAB} are needed "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Read a Hugging Face tokenizer directory.

    Raises:
        UserError: tokenizer.json is absent or unreadable, or the tokenizer names no end-of-text token, or one that is
            not in its vocabulary.
    """
    files = {name: (directory / name).read_bytes() for name in HF_FILES if (directory / name).is_file()}
    backend = open_backend(directory)
    eos_token = declared_token(directory, "eos_token")
    if eos_token is None:
        raise UserError(f"{directory}: the tokenizer has no eos_token in tokenizer_config.json; documents need one")
    if backend.token_to_id(eos_token) is None:
        raise UserError(f"{directory}: the eos_token {eos_token!r} is not in the vocabulary of tokenizer.json")
    return _for_plain_text(backend, eos_token, files)


def with_special_tokens(tokenizer: TextTokenizer, names: Sequence[str]) -> TextTokenizer:
    """Add special tokens to a tokenizer; the ids of those that it lacks follow its largest."""
    backend = Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    others = [name for name in names if name not in config.get("additional_special_tokens", [])]
    config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *others]
    files = {"tokenizer.json": backend.to_str(pretty=True).encode(), "tokenizer_config.json": _to_json(config)}
    backend.no_truncation()
    backend.no_padding()
    return _for_plain_text(backend, tokenizer.eos_token, tokenizer.files | files)


def open_backend(directory: Path) -> Tokenizer:
    """Open ``tokenizer.json`` of a directory, without the padding and truncation that it may declare.

    Raises:
        UserError: It is absent or unreadable.
    """
    path = directory / "tokenizer.json"
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (a Hugging Face tokenizer directory is needed)") from None
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def rows_needed(backend: Tokenizer) -> int:
    """Count the rows that an embedding needs: one more than the largest id, as ids may have gaps."""
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def check_vocabulary(directory: Path, model_vocab_size: int) -> Tokenizer:
    """Open the tokenizer of a directory, and check that a model has a row for each of its tokens.

    Raises:
        UserError: The tokenizer is absent, or has tokens that the model has not.
    """
    backend = open_backend(directory)
    if rows_needed(backend) > model_vocab_size:
        raise UserError(
            f"tokenizer.name: {directory} has a vocabulary of {rows_needed(backend)}, "
            f"which exceeds model.vocab_size {model_vocab_size}"
        )
    return backend


def declared_token(directory: Path, key: str) -> str | None:
    """Read a special token, such as ``eos_token``, from the first configuration file that has it.

    It stands there as a string, or a mapping with its ``content``.

    Raises:
        UserError: One of the files is no JSON object.
    """
    for path in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        try:
            config: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
            declared = config.get(key)
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a JSON object: {error}") from error
        if key not in config:
            continue
        token = declared.get("content") if isinstance(declared, dict) else declared
        return token if isinstance(token, str) and token else None
    return None


def _for_plain_text(backend: Tokenizer, eos_token: str, files: dict[str, bytes]) -> TextTokenizer:
    """Set the tokenizer up for documents: blind to special tokens that the text spells out."""
    backend.encode_special_tokens = True
    return TextTokenizer(backend, rows_needed(backend), eos_token, backend.token_to_id(eos_token), files)


def _has_one_thread() -> bool:
    """Tell if the library has one thread, or no more than are as slow as one that remembers pieces."""
    return os.environ.get(PARALLELISM) == "false" or available_cores() < MANY_CORES


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
