"""Tokens a second of the loader, of packed samples and of documents, and the time that packing plans take.

    python -m benchmarks.loader [--rounds 3] [--seq-len 512] [--directory DIR]

The text is the quickstart's, Python's standard library, prepared in both layouts in ``DIR``. One process reads a whole
epoch of each kind, in turn, without training. Prints JSON: medians, the smallest and the largest, and every value.

Rows of documents say which document each of their tokens is of; packed samples do so only where documents are told
apart. So packing is compared with ``packed, documents apart``, whose batches have the same tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moefoundry.config.curriculum import Stage
from moefoundry.config.schema_data import FimConfig, FimSplit, PackingConfig, PackingMethod
from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.data.loader import build_loader
from moefoundry.data.options import PrepareOptions
from moefoundry.data.packing_plan import best_fit, concatenated
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout

BATCH = 8
VOCAB = 4096
PACKED, APART, STAGED = "packed", "packed, documents apart", "best_fit, a stage of a curriculum"
BEST_FIT = PackingConfig(PackingMethod.best_fit)
KINDS: dict[str, dict[str, Any]] = {
    "concat": {},
    "best_fit": {"packing": BEST_FIT},
    "best_fit, fim by tokens": {"packing": BEST_FIT, "fim": FimConfig()},
    "best_fit, fim by characters": {"packing": BEST_FIT, "fim": FimConfig(split=FimSplit.characters)},
}


def prepared(directory: Path, seq_len: int) -> tuple[Path, Path]:
    """Prepare the text in both layouts, unless that is done; return packed samples and documents."""
    packed, documents = directory / f"packed{seq_len}", directory / "documents"
    prepare(PrepareOptions("stdlib", documents, vocab_size=VOCAB, layout=Layout.documents))
    prepare(PrepareOptions("stdlib", packed, seq_len, tokenizer=documents / "tokenizer"))
    return packed, documents


def tokens_per_second(
    local: Path, tokenizer: Path, seq_len: int, changes: dict[str, Any], apart: bool = False, staged: bool = False
) -> float:
    """Read an epoch from its second batch on; padding is not counted.

    Args:
        local: The data.
        tokenizer: Their tokenizer.
        seq_len: Tokens of a row.
        changes: Keys of the dataset.
        apart: Tell documents apart.
        staged: Read as the only stage of a curriculum.
    """
    config = LoaderConfig(dataset=DatasetConfig(local=str(local), shuffle_seed=1, max_seq_len=seq_len, **changes))
    loader = build_loader(
        config,
        batch_size=BATCH,
        model_vocab_size=VOCAB,
        tokenizer=tokenizer,
        documents_of=tokenizer if apart else None,
        stages=[Stage("only", 0, None, BATCH, seq_len, BATCH)] if staged else [],
    )
    batches = iter(loader)
    next(batches)
    begun, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += int((batch["sequence_id"] >= 0).sum()) if "sequence_id" in batch else batch["input_ids"].numel()
    return tokens / (time.perf_counter() - begun)


def measure(directory: Path, seq_len: int, rounds: int) -> dict[str, Any]:
    """Measure every kind ``rounds`` times in turn, and the plans."""
    packed, documents = prepared(directory, seq_len)
    tokenizer = documents / "tokenizer"
    values: dict[str, list[float]] = {name: [] for name in (PACKED, APART, *KINDS, STAGED)}
    for _ in range(rounds):
        for name in (PACKED, APART):
            values[name].append(tokens_per_second(packed, tokenizer, seq_len, {}, apart=name == APART))
        for name, changes in KINDS.items():
            values[name].append(tokens_per_second(documents, tokenizer, seq_len, changes))
        values[STAGED].append(tokens_per_second(documents, tokenizer, seq_len, KINDS["best_fit"], staged=True))
    lengths = np.load(documents / "train" / "lengths.npy")
    plans = {}
    for method in (concatenated, best_fit):
        begun = time.perf_counter()
        plan = method(lengths, seq_len)
        seconds = time.perf_counter() - begun
        epoch = plan.tokens / statistics.median(values["best_fit" if method is best_fit else "concat"])
        plans[method.__name__] = {
            "rows": plan.rows,
            "waste": plan.waste,
            "documents_cut": plan.cut,
            "plan_seconds": seconds,
            "share_of_loader": seconds / epoch,
        }
    return {
        "seq_len": seq_len,
        "documents": len(lengths),
        "tokens_per_second": {name: statistics.median(each) for name, each in values.items()},
        "spread": {name: [min(each), max(each)] for name, each in values.items()},
        "values": values,
        "plans": plans,
        "bytes": {
            path.name: sum(file.stat().st_size for file in (path / "train").iterdir()) for path in (packed, documents)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(options.directory or Path(scratch), options.seq_len, options.rounds), indent=2))


if __name__ == "__main__":
    main()
