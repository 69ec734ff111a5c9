"""`moefoundry prepare`: text to token shards. Heavy imports happen in :func:`run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import local_path

if TYPE_CHECKING:
    from moefoundry.data.prepare import PreparedSummary

DESCRIPTION = """\
Tokenize a corpus and write it as shards that training streams.

SOURCE is a directory or file of text (.txt, .md), of JSONL, or a source tree; the word `stdlib` is the source of this
Python's standard library. OUT gets tokenizer/, train/, val/ and corpus.json. A second run with the same input and
options does nothing."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``subparsers`` of the main parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "prepare",
        help="turn text into token shards",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="file, directory, or `stdlib`")
    parser.add_argument("out", metavar="OUT", type=local_path, help="directory to make")
    parser.add_argument("--max-seq-len", type=int, default=512, metavar="N", help="tokens a sample (default 512)")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="vocabulary to train (default 4096)")
    parser.add_argument(
        "--tokenizer", type=local_path, metavar="DIR", help="use this Hugging Face tokenizer instead of training one"
    )
    parser.add_argument("--max-vocab", type=int, metavar="N", help="refuse a larger vocabulary (the model's)")
    parser.add_argument("--format", choices=["text", "jsonl", "source"], help="inferred if not given")
    parser.add_argument(
        "--glob", action="append", default=[], metavar="PATTERN", help="files of a source tree (default **/*.py)"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSONL key of the text (default text)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.05, metavar="F", help="share of files held out (default 0.05)"
    )
    parser.add_argument("--max-docs", type=int, metavar="N", help="use only the first N documents")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="use only the first documents of N bytes in all")
    parser.add_argument("--seed", type=int, default=17, metavar="N", help="decides what is held out (default 17)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that was prepared differently")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; a :class:`~moefoundry.config.errors.UserError` is the caller's to print."""
    from moefoundry.data.corpus import CorpusFormat
    from moefoundry.data.prepare import PrepareOptions, prepare

    prepared = prepare(
        PrepareOptions(
            source=args.source,
            out=args.out,
            max_seq_len=args.max_seq_len,
            vocab_size=args.vocab_size,
            tokenizer=args.tokenizer,
            max_vocab=args.max_vocab,
            format=CorpusFormat(args.format) if args.format else None,
            globs=tuple(args.glob),
            text_key=args.text_key,
            val_fraction=args.val_fraction,
            max_docs=args.max_docs,
            max_bytes=args.max_bytes,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    )
    print(describe(prepared))
    return 0


def describe(prepared: PreparedSummary) -> str:
    """The summary that a person reads: one line a split."""
    corpus = prepared.corpus
    state = "up to date" if prepared.up_to_date else "prepared"
    lines = [f"{prepared.out}: {state} (vocabulary {corpus.vocab_size}, samples of {corpus.max_seq_len} tokens)"]
    for name, split in corpus.splits.items():
        lines.append(
            f"  {name:5s} {split.documents:>9,} documents {split.tokens:>13,} tokens {split.samples:>9,} samples"
            f"  {split.bytes / split.tokens:.2f} bytes/token  unigram entropy {split.unigram_entropy_nats:.3f} nats"
        )
    if corpus.skipped:
        lines.append(f"  left out: {corpus.skipped:,} blank or not UTF-8")
    return "\n".join(lines)
