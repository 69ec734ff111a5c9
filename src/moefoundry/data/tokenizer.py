"""Tokenizers: train a byte-level BPE, or take a given one; both end as a Hugging Face directory.

Byte-level BPE (GPT-2's scheme): text is split into words, spaces and punctuation, every byte is a letter of the
initial alphabet, and merges are learned on top. Any text round-trips exactly and nothing is ever unknown.

Special tokens take the first ids. The fill-in-the-middle ones are reserved even where training does not use them yet,
so that a model trained today keeps its vocabulary.

Only the ``tokenizers`` library is used: ``transformers`` takes seconds to import and reads the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moefoundry.config.errors import UserError

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
FIM_TOKENS = ("<fim_begin>", "<fim_hole>", "<fim_end>")
SPECIAL_TOKENS = (EOS_TOKEN, PAD_TOKEN, *FIM_TOKENS)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)  # every byte, every special token, no merge

# What a Hugging Face tokenizer directory may hold; the first is the one that is read here.
HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the facts that preparation needs of it.

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
        """Digest of tokenizer.json, which alone decides how text is cut."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text, in parallel threads; no special token is added, and none is read out of the text."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def save(self, directory: Path) -> None:
        """Write the Hugging Face files into a new directory."""
        directory.mkdir(parents=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


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
    backend.train_from_iterator(texts, trainer)
    tokens = {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
    special = {**tokens, "additional_special_tokens": list(FIM_TOKENS)}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _to_json(config),
        "special_tokens_map.json": _to_json(special),
    }
    return _for_plain_text(backend, EOS_TOKEN, files)


def check_trainable(vocab_size: int) -> None:
    """Make sure that a vocabulary to be learned can have this size.

    Raises:
        UserError: It does not hold the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"--vocab-size {vocab_size}: at least {SMALLEST_VOCAB} are needed "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Read a Hugging Face tokenizer directory.

    Raises:
        UserError: tokenizer.json is absent or unreadable, or the tokenizer names no end-of-text token, or one that is
            not in its vocabulary.
    """
    files = {name: (directory / name).read_bytes() for name in HF_FILES if (directory / name).is_file()}
    if "tokenizer.json" not in files:
        raise UserError(f"{directory / 'tokenizer.json'}: no such file (a Hugging Face tokenizer directory is needed)")
    try:
        backend = Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{directory / 'tokenizer.json'}: not a tokenizer: {error}") from error
    eos_token = _declared_eos(directory, files)
    if eos_token is None:
        raise UserError(f"{directory}: the tokenizer has no eos_token in tokenizer_config.json; documents need one")
    if backend.token_to_id(eos_token) is None:
        raise UserError(f"{directory}: the eos_token {eos_token!r} is not in the vocabulary of tokenizer.json")
    return _for_plain_text(backend, eos_token, files)


def check_vocabulary(directory: Path, model_vocab_size: int) -> TextTokenizer:
    """The tokenizer of a directory, if a model has a row for each of its tokens.

    Raises:
        UserError: The tokenizer is absent, or has tokens that the model has not.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"tokenizer.name: {directory} has a vocabulary of {tokenizer.vocab_size}, "
            f"which exceeds model.vocab_size {model_vocab_size}"
        )
    return tokenizer


def _for_plain_text(backend: Tokenizer, eos_token: str, files: dict[str, bytes]) -> TextTokenizer:
    """Set the tokenizer up for documents: whole, unpadded, and blind to special tokens that the text spells out."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(backend, vocab_size, eos_token, backend.token_to_id(eos_token), files)


def _declared_eos(directory: Path, files: dict[str, bytes]) -> str | None:
    """The end-of-text token that the configuration files name: a string, or a mapping with its ``content``."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            config: dict[str, Any] = json.loads(files.get(name, b"{}"))
            declared = config.get("eos_token")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{directory / name}: not a JSON object: {error}") from error
        token = declared.get("content") if isinstance(declared, dict) else declared
        if isinstance(token, str) and token:
            return token
    return None


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
