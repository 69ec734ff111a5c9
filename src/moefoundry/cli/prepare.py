"""`moefoundry prepare`: text to token shards. Heavy imports happen in :func:`run`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import local_path
from moefoundry.data.left_out import describe_left_out, describe_share

if TYPE_CHECKING:
    from moefoundry.data.prepare import PreparedSummary

DESCRIPTION = """\
Tokenize a corpus and write it as shards that training streams.

SOURCE is a directory or file of text (.txt, .md), of JSON Lines or Parquet, or a source tree, compressed (.gz, .zst,
.bz2, .xz) or not; the word `stdlib` is the source of this Python's standard library. OUT gets tokenizer/, train/, val/
and corpus.json. A second run with the same input and options does nothing.

What cannot be read (bad bytes, lines that are no JSON, records without text) is left out and named; beyond 1% of the
bytes (--max-loss) it is an error. Exit status: 0 done, 2 an error you can put right, 130 Ctrl-C, 143 SIGTERM."""


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
    parser.add_argument("--format", choices=["text", "jsonl", "source", "parquet"], help="inferred if not given")
    parser.add_argument(
        "--glob", action="append", default=[], metavar="PATTERN", help="files to take, such as **/*.rs; may be repeated"
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="JSONL, Parquet: key of the text, such as data.text (default text)",
    )
    parser.add_argument(
        "--bad-bytes",
        choices=["drop", "replace"],
        default="drop",
        help="bytes that are not UTF-8: drop their line (default), or replace them",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the bytes that may be left out (default 0.01)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of files held out; 0 holds nothing out (default 0.05)",
    )
    parser.add_argument("--max-docs", type=int, metavar="N", help="use only the first N documents")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="use only the first documents of N bytes in all")
    parser.add_argument("--seed", type=int, default=17, metavar="N", help="decides what is held out (default 17)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that was prepared differently")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; a :class:`~moefoundry.config.errors.UserError` is the caller's to print."""
    try:
        with _stop_signals():
            prepared = _prepare(args)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"error: stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
        return 128 + number
    print(describe(prepared))
    return 0


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does, once, so that what was begun is cleaned up."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}

    def interrupt(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for number in signals:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(args: argparse.Namespace) -> PreparedSummary:
    from moefoundry.data.formats import CorpusFormat
    from moefoundry.data.options import PrepareOptions
    from moefoundry.data.prepare import prepare
    from moefoundry.data.reading import BadBytes

    return prepare(
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
            bad_bytes=BadBytes(args.bad_bytes),
            max_loss=args.max_loss,
            val_fraction=args.val_fraction,
            max_docs=args.max_docs,
            max_bytes=args.max_bytes,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    )


def describe(prepared: PreparedSummary) -> str:
    """The summary that a person reads: one line a split, and what was not prepared."""
    corpus = prepared.corpus
    state = "up to date" if prepared.up_to_date else "prepared"
    lines = [f"{prepared.out}: {state} (vocabulary {corpus.vocab_size}, samples of {corpus.max_seq_len} tokens)"]
    for name, split in corpus.splits.items():
        lines.append(
            f"  {name:5s} {split.documents:>9,} documents {split.tokens:>13,} tokens {split.samples:>9,} samples"
            f"  {split.bytes / split.tokens:.2f} bytes/token  unigram entropy {split.unigram_entropy_nats:.3f} nats"
        )
    if corpus.division.get("train_bytes") is not None:
        lines.append(f"  held out: the last {corpus.division['val_fraction']:.1%} of the text, as there is so little")
    elif corpus.division and corpus.division["val_fraction"] != corpus.inputs["val_fraction"]:
        lines.append(
            f"  held out with --val-fraction {corpus.division['val_fraction']:.3g}, for a sample in each split"
        )
    if corpus.left_out:
        share = f", {describe_share(corpus.left_out_share)} of the bytes" if corpus.left_out_share != 0 else ""
        lines.append(f"  left out{share}: {describe_left_out(corpus.left_out)}")
    elif corpus.skipped:
        lines.append(f"  left out: {corpus.skipped:,} blank or not UTF-8")
    if unknown := sum(split.unknown_tokens for split in corpus.splits.values()):
        tokens = corpus.max_seq_len * sum(split.samples for split in corpus.splits.values())
        lines.append(f"  unknown to the tokenizer: the text of {unknown:,} tokens, {unknown / tokens:.2%} of all")
    if prepared.ignored:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in prepared.ignored[:5])
        lines.append(f"  not part of it: {kinds}{', ...' if len(prepared.ignored) > 5 else ''} (--glob takes others)")
    return "\n".join(lines)
