"""The mappings of a recipe's ``curriculum``."""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import BORDER, MAX_BATCH, REQUIRED, Auto, key


@dataclass
class StageStreamConfig:
    """One of the streams that a stage reads."""

    proportion: float = key(REQUIRED, "Share of the stage's rows, relative to those of its other streams.", gt=0)


@dataclass
class StageConfig:
    """One stage. A key that is null is the recipe's."""

    until: str | None = key(
        None,
        "Where the stage ends, counted from the beginning of the run; of the last stage alone null: it does not end.",
        pattern=BORDER,
        instead_of={"duration": "a stage ends at until, which counts from the beginning of the run"},
    )
    max_seq_len: int | None = key(None, "Tokens a row, at most as many as the recipe's.", ge=2)
    global_train_batch_size: int | None = key(
        None, "Sequences of one optimizer step, over all ranks.", ge=1, le=MAX_BATCH
    )
    device_train_microbatch_size: int | Auto | None = key(
        None, "Sequences of one forward pass of one rank; auto as in the recipe.", ge=1, le=MAX_BATCH
    )
    streams: dict[str, StageStreamConfig] | None = key(
        None, "The streams that are read, by their names in train_loader.dataset.streams; null reads them as that says."
    )
