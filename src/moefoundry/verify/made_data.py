"""Data for twins: documents of drawn words, prepared as any corpus, one for each stream of the recipe.

All documents differ, so that a row tells which it is; their lengths are such that packing has something to do.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np

from moefoundry.config import Recipe
from moefoundry.data.options import Kind, PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.reference import write_reference
from moefoundry.data.sources import read_lengths
from moefoundry.data.summary import Layout

DOCUMENTS = 72
VOCABULARY = 384
WORDS = [first + second for first in ("ba", "do", "ki", "lu", "me") for second in ("n", "ra", "sho", "tt", "x")]


def make_data(recipe: Recipe) -> None:
    """Prepare the data that a twin's loader names, and its tokenizer; what is there already stays."""
    tokenizer = Path(recipe.tokenizer.name)
    if tokenizer.exists():
        return
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    words = _prepared(tokenizer.parent / "words", None, DOCUMENTS, pairs=False)
    shutil.copytree(words / "tokenizer", tokenizer)
    pairs = recipe.dpo is not None
    for number, source in enumerate(recipe.train_loader.dataset.sources.values()):
        out = _prepared(Path(source.local), tokenizer, number, pairs)
        if pairs:
            _score(out / str(source.split))


def _prepared(out: Path, tokenizer: Path | None, number: int, pairs: bool) -> Path:
    """Write documents and prepare them; without a tokenizer, one is trained."""
    text = out.with_suffix(".jsonl")
    text.write_text("".join(json.dumps(_record(number, index, pairs)) + "\n" for index in range(DOCUMENTS)))
    options = PrepareOptions(
        str(text),
        out,
        vocab_size=VOCABULARY,
        tokenizer=tokenizer,
        layout=Layout.documents,
        kind=Kind.preferences if pairs else Kind.text,
        val_fraction=0.0,
        workers=0,
    )
    prepare(options)
    return out


def _record(stream: int, index: int, pairs: bool) -> dict[str, str]:
    draw = random.Random(1000 * stream + index)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    if pairs:
        return {"prompt": f"{stream} {index}", "chosen": words(2, 5), "rejected": words(6, 9)}
    return {"text": f"{stream} {index} {words(4, 60)}"}


def _score(split: Path) -> None:
    """Write log-probabilities as of a reference model; any will do."""
    pairs = len(read_lengths(split)) // 2
    values = -np.random.default_rng(0).uniform(5, 50, (pairs, 2)).astype(np.float32)
    write_reference(split, values, "drawn")
