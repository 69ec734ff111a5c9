"""``corpus.json``, the record of a prepared corpus.

It is the last file that preparation writes, so a directory that has it is complete. Training reads it to check a recipe
against the data and to report the unigram entropy, without opening a shard.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.identity import corpus_digest, stream_digest

CORPUS_FILE = "corpus.json"
FORMAT_VERSION = 1  # of the directory's layout; another number is another preparation


@dataclass(frozen=True)
class SplitSummary:
    """One split.

    Attributes:
        documents: Documents, each followed by one end-of-text token.
        bytes: UTF-8 bytes of their text.
        tokens: Tokens of the split, end-of-text tokens included.
        samples: Samples of ``max_seq_len`` tokens on disk.
        dropped_tokens: The tail that filled no sample; ``tokens == samples * max_seq_len + dropped_tokens``.
        unigram_entropy_nats: Entropy of the token frequencies of the samples, in nats a token: the loss of the best
            model that ignores context.
        sha256: Digest of the samples and their order; see :mod:`moefoundry.data.identity`.
        unknown_tokens: Tokens of the samples that stand for text which the tokenizer does not know.
    """

    documents: int
    bytes: int
    tokens: int
    samples: int
    dropped_tokens: int
    unigram_entropy_nats: float
    sha256: str
    unknown_tokens: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """A prepared corpus.

    Attributes:
        format_version: Version of the directory's layout.
        moefoundry_version: The release that wrote it.
        source: The source as the user gave it; for people, not compared.
        max_seq_len: Tokens a sample.
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
    """

    format_version: int
    moefoundry_version: str
    source: str
    max_seq_len: int
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

    def write(self, directory: Path) -> None:
        """Write corpus.json into ``directory``."""
        (directory / CORPUS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


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
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format version {version}, this release reads {FORMAT_VERSION}; prepare it again")
    try:
        _add_digests(record, Path(local))
        splits = {name: SplitSummary(**split) for name, split in record.pop("splits").items()}
        return CorpusSummary(**record, splits=splits)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: damaged: {error}") from error


def _add_digests(record: dict[str, Any], local: Path) -> None:
    """Compute the digests that a corpus.json of an earlier version lacks, from the indices of the shards."""
    for name, split in record["splits"].items():
        if "sha256" not in split:
            split["sha256"] = stream_digest(local / name)
    if "sha256" not in record:
        streams = {name: split["sha256"] for name, split in record["splits"].items()}
        record["sha256"] = corpus_digest(record["tokenizer_sha256"], record["eos_id"], streams)
