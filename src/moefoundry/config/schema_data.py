"""The mappings below a loader's ``dataset``: packing, fill-in-the-middle and streams."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import REQUIRED, SPLIT, key


class PackingMethod(StrEnum):
    """Ways to make rows of documents."""

    concat = "concat"
    best_fit = "best_fit"
    none = "none"
    pairs = "pairs"


@dataclass
class PackingConfig:
    """Packing of documents as they are read."""

    method: PackingMethod = key(
        PackingMethod.concat,
        "concat joins documents and cuts every max_seq_len tokens; best_fit cuts only documents longer than that; none "
        "makes a row of each document; pairs makes one of a chosen and a rejected response, for dpo.",
        instead_of={
            "packing_ratio": "there is no ratio to find: train_loader.dataset.packing.method=best_fit fills rows",
        },
    )


class FimFormat(StrEnum):
    """Orders of the parts of a document: prefix, suffix, middle, or the suffix first, or either by chance."""

    psm = "psm"
    spm = "spm"
    mixed = "mixed"


class FimSplit(StrEnum):
    """Places where a document may be divided: between tokens, or between characters."""

    tokens = "tokens"
    characters = "characters"


@dataclass
class FimConfig:
    """Fill-in-the-middle."""

    rate: float = key(0.1, "Share of the documents that are reordered.", ge=0, le=1, renamed_from=("fim_rate",))
    format: FimFormat = key(
        FimFormat.psm,
        "Prefix, suffix, middle; or the suffix first; or either by chance, evenly.",
        instead_of={"fim_spm_rate": "train_loader.dataset.fim.format=spm is a rate of 1, mixed one of 0.5"},
    )
    split: FimSplit = key(FimSplit.tokens, "Documents are divided between tokens, or between characters.")
    sentinels: list[str] | None = key(
        None,
        "Special tokens before prefix, suffix and middle; null finds those of StarCoder, Qwen, DeepSeek and others.",
        length=3,
    )


@dataclass
class StreamConfig:
    """One of several sources of a loader. At most one of proportion, repeat and choose; all or none with proportion."""

    local: str = key(
        REQUIRED,
        "Directory written by `moefoundry prepare`, or cache of remote.",
        customary="data/NAME",
        path=True,
        free_on_resume=True,
    )
    remote: str | None = key(
        None, "Where missing shards are downloaded from; a URL or a path.", path=True, free_on_resume=True
    )
    split: str | None = key(
        None, "Sub-directory of local and remote; null is the dataset's.", pattern=SPLIT, free_on_resume=True
    )
    proportion: float | None = key(None, "Share of an epoch's rows, relative to those of the other streams.", gt=0)
    repeat: float | None = key(None, "Times that its rows are read in an epoch.", gt=0)
    choose: int | None = key(None, "Rows that are read in an epoch.", ge=1)
