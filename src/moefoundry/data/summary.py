"""``corpus.json``, the record of a prepared corpus.

It is the last file that preparation writes, so a directory that has it is complete. Training reads it to check a recipe
against the data and to report the unigram entropy, without opening a shard.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.identity import corpus_digest, stream_digest

CORPUS_FILE = "corpus.json"
LENGTHS_FILE = "lengths.npy"


class Layout(StrEnum):
    """Samples on disk: ``packed`` ones of ``max_seq_len`` tokens, or ``documents`` of any length, packed when read."""

    packed = "packed"
    documents = "documents"


FORMAT_VERSIONS = {Layout.packed: 1, Layout.documents: 2}
"""Versions of the directory's layout; another number is another preparation."""


@dataclass(frozen=True)
class SplitSummary:
    """One split.

    Attributes:
        documents: Documents, each followed by one end-of-text token.
        bytes: UTF-8 bytes of their text.
        tokens: Tokens of the split, end-of-text tokens included.
        samples: Samples on disk: of ``max_seq_len`` tokens, or one for each document.
        dropped_tokens: The tail that filled no sample; ``tokens == samples * max_seq_len + dropped_tokens``. Nothing
            is dropped of documents.
        unigram_entropy_nats: Entropy of the token frequencies of the samples, in nats a token: the loss of the best
            model that ignores context.
        sha256: Digest of the samples and their order; see :mod:`moefoundry.data.identity`.
        unknown_tokens: Tokens of the samples that stand for text which the tokenizer does not know.
        truncated_documents, truncated_tokens: Records that were cut to the most tokens, and the tokens cut off.
        lengths_sha256: Documents only: SHA-256, in hex, of ``lengths.npy``, the tokens of each sample.
    """

    documents: int
    bytes: int
    tokens: int
    samples: int
    dropped_tokens: int
    unigram_entropy_nats: float
    sha256: str
    unknown_tokens: int = 0
    lengths_sha256: str | None = None
    truncated_documents: int = 0
    truncated_tokens: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """A prepared corpus.

    Attributes:
        format_version: Version of the directory's layout.
        moefoundry_version: The release that wrote it.
        source: The source as the user gave it; for people, not compared.
        max_seq_len: Tokens a sample; None for documents.
        vocab_size: Rows that an embedding needs.
        eos_token, eos_id: The end-of-text token.
        tokenizer_sha256: Digest of tokenizer/tokenizer.json.
        skipped: Files, lines and records left out.
        inputs: All that decides the content: the options and the digest of the documents.
        splits: ``train`` and ``val``.
        sha256: Digest of the corpus; see :mod:`moefoundry.data.identity`.
        left_out: Count, bytes and first names of the losses, by reason. This and the next two are empty in the file of
            an earlier version.
        left_out_share: Share of the bytes that was lost; None if not known.
        division: Division of the splits; see :class:`moefoundry.data.splits.Division`.
        layout: Samples on disk.
    """

    format_version: int
    moefoundry_version: str
    source: str
    max_seq_len: int | None
    vocab_size: int
    eos_token: str
    eos_id: int
    tokenizer_sha256: str
    skipped: int
    inputs: dict[str, Any]
    splits: dict[str, SplitSummary]
    sha256: str
    left_out: dict[str, Any] = field(default_factory=dict)
    left_out_share: float | None = 0.0
    division: dict[str, Any] = field(default_factory=dict)
    layout: Layout = Layout.packed

    @property
    def kind(self) -> str:
        """Kind of its documents, a value of :class:`moefoundry.data.options.Kind`."""
        return str(self.inputs.get("kind", "text"))

    def write(self, directory: Path) -> None:
        """Write corpus.json into ``directory``. That of packed samples is the same as in the first release."""
        record = asdict(self)
        if self.layout is Layout.packed:
            del record["layout"]
            for split in record["splits"].values():
                for later in ("lengths_sha256", "truncated_documents", "truncated_tokens"):
                    del split[later]
        (directory / CORPUS_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_corpus_summary(local: str | Path) -> CorpusSummary:
    """Read corpus.json of a prepared corpus.

    Raises:
        UserError: It is absent, damaged, or of another format version.
    """
    file = Path(local) / CORPUS_FILE
    try:
        record = json.loads(file.read_text())
        version = record["format_version"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; not a directory that `moefoundry prepare` completed") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from error
    if version not in FORMAT_VERSIONS.values():
        known = " and ".join(str(number) for number in FORMAT_VERSIONS.values())
        raise UserError(f"{file}: format version {version}, this release reads {known}; prepare it again")
    try:
        _add_digests(record, Path(local))
        splits = {name: SplitSummary(**split) for name, split in record.pop("splits").items()}
        layout = Layout(record.pop("layout", Layout.packed))
        return CorpusSummary(**record, splits=splits, layout=layout)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: damaged: {error}") from error


def _add_digests(record: dict[str, Any], local: Path) -> None:
    """Compute the digests that a corpus.json of an earlier version lacks, from the indices of the shards."""
    for name, split in record["splits"].items():
        if "sha256" not in split:
            split["sha256"] = stream_digest(local / name)
    if "sha256" not in record:
        streams = {name: split["sha256"] for name, split in record["splits"].items()}
        record["sha256"] = corpus_digest(record["tokenizer_sha256"], record["eos_id"], streams)
