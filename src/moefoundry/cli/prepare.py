"""``moefoundry prepare``: text to token shards. Heavy imports happen when it runs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moefoundry.cli.arguments import (
    Number,
    flags_of,
    former_option,
    json_option,
    local_path,
    options_named,
    place,
    positive,
    required,
)

if TYPE_CHECKING:
    from moefoundry.data.parts import PartSummary
    from moefoundry.data.prepare import PreparedSummary

MERGE = "merge"
"""Word in the place of a source that joins the parts of OUT."""


@click.command("prepare")
@click.argument("source", metavar="SOURCE", help="A file or directory, `stdlib`, or `merge`.")
@click.argument(
    "out", type=place, metavar="OUT", required=False, callback=required, help="Directory to make, or a URL."
)
@former_option("-o", "--output", name="out", kind=place, hidden=False, metavar="OUT", help="The same as OUT.")
@click.option(
    "--layout",
    type=click.Choice(["packed", "documents"]),
    help="Documents, which are packed when they are read, or samples packed to one length (default documents).",
)
@click.option("--instructions", is_flag=True, help="SOURCE has records of prompts and responses.")
@click.option("--preferences", is_flag=True, help="SOURCE has records of a prompt, chosen and rejected.")
@click.option(
    "--target-responses",
    type=click.Choice(["last", "all"]),
    help="Instructions: predict the last response of a conversation (default last), or all.",
)
@click.option("--target-prompts", metavar="WHICH", help="Instructions: prompts to predict: none, all, or length>=N.")
@click.option("--max-tokens", type=int, metavar="N", help="Tokens of a record at most (default: any number).")
@click.option(
    "--too-long",
    type=click.Choice(["truncate", "drop", "error"]),
    help="Records of more: truncate them (default truncate), drop them, or stop.",
)
@click.option("--max-seq-len", type=int, metavar="N", help="Tokens of a packed sample (default 512); N alone packs.")
@click.option("--vocab-size", type=int, metavar="N", help="Size of the vocabulary to train (default 4096).")
@click.option("--tokenizer", type=local_path, metavar="DIR", help="Hugging Face tokenizer to use; none is trained.")
@click.option("--add-fim-tokens", is_flag=True, help="Give that tokenizer special tokens for fill-in-the-middle.")
@click.option("--max-vocab", type=int, metavar="N", help="Refuse a larger vocabulary (the model's).")
@click.option(
    "--format", type=click.Choice(["text", "jsonl", "source", "parquet", "arrow"]), help="Inferred if not given."
)
@click.option("--glob", "globs", multiple=True, metavar="PATTERN", help="Files to take, such as **/*.rs; repeatable.")
@click.option("--text-key", metavar="KEY", help="Records: key of the text, such as data.text (default text).")
@click.option(
    "--bad-bytes",
    type=click.Choice(["drop", "replace"]),
    help="Bytes that are not UTF-8: drop their line (default drop), or replace them.",
)
@click.option("--max-loss", type=Number(), metavar="F", help="Share of the bytes that may be left out (default 0.01).")
@click.option("--val-fraction", type=Number(), metavar="F", help="Share of files held out, or 0 (default 0.05).")
@click.option("--max-docs", type=int, metavar="N", help="Use only the first N documents.")
@click.option("--max-bytes", type=int, metavar="N", help="Use only the first documents of N bytes in all.")
@click.option("--seed", type=int, metavar="N", help="Decides which files are held out (default 17).")
@click.option(
    "--workers", type=positive, metavar="N", help="Processes (default: the cores). The result is always the same."
)
@click.option("--part", metavar="I/N", help="Prepare the I-th of N parts; `prepare merge OUT` joins them.")
@click.option("--ray", metavar="ADDRESS", help="Do the work on a Ray cluster: auto, ray://HOST:PORT or local.")
@click.option("--overwrite", is_flag=True, help="Replace a corpus that was prepared differently.")
@json_option
def command(
    format: str | None,
    bad_bytes: str | None,
    layout: str | None,
    instructions: bool,
    preferences: bool,
    part: str | None,
    ray: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Tokenize a corpus and write it as shards that training streams.

    SOURCE holds text (.txt, .md), JSON Lines, Parquet or a data set that Hugging Face's datasets saved to disk, or is a
    source tree, compressed (.gz, .zst, .bz2, .xz) or not; the word `stdlib` is the source of this Python's standard
    library. OUT gets tokenizer/, train/, val/ and corpus.json. A second run with the same input and options does
    nothing.

    Several machines that see OUT share the work: each prepares a part with `--part I/N`, 1/N to N/N, and afterwards
    `moefoundry prepare merge OUT` joins them. A run that was ended goes on where it was when it is started again.

    Input that cannot be read (bad bytes, lines that are no JSON, records without text) is left out and named; beyond 1%
    of the bytes (--max-loss) it is an error. Exit status: 0 done, 2 an error you can put right, 130 Ctrl-C, 143
    SIGTERM.
    """
    from moefoundry.data.formats import CorpusFormat
    from moefoundry.data.instructions import TargetResponses, TooLong
    from moefoundry.data.options import Kind, PrepareOptions
    from moefoundry.data.reading import BadBytes
    from moefoundry.data.summary import Layout

    options |= {"format": CorpusFormat(format) if format else None, "bad_bytes": bad_bytes and BadBytes(bad_bytes)}
    options |= {"layout": layout and Layout(layout)}
    if instructions and preferences:
        raise click.UsageError("--instructions and --preferences: give one of them")
    options["kind"] = Kind.instructions if instructions else Kind.preferences if preferences else None
    for name, choice in (("target_responses", TargetResponses), ("too_long", TooLong)):
        options[name] = options[name] and choice(options[name])
    given = {name: value for name, value in options.items() if value is not None}
    flags = flags_of(*PrepareOptions.__dataclass_fields__, "part", "ray") | {
        "globs": "--glob",
        "kind": f"--{options['kind']}",
    }
    try:
        with _stop_signals(), options_named(flags):
            result, text = _run(given, part, ray)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"error: stopped by {signal.Signals(number).name}; OUT was not written", file=sys.stderr)
        return 128 + number
    print(json.dumps(asdict(result), indent=2, default=str) if as_json else text)
    return 0


def _run(given: dict[str, Any], part: str | None, ray: str | None) -> tuple[PreparedSummary | PartSummary, str]:
    """Do what the options ask for; return the result, and the same for a person."""
    from moefoundry.config.errors import UserError
    from moefoundry.data.options import Part, PrepareOptions, check_applicable
    from moefoundry.data.parts import merge_parts, prepare_part
    from moefoundry.data.prepare import prepare
    from moefoundry.data.ray_tasks import prepare_with_ray

    if part and ray:
        raise UserError(f"part={part}: not with ray=..., which prepares all parts")
    if given["source"] == MERGE:
        others = {name for name, value in (given | {"part": part, "ray": ray}).items() if value} - {
            "source",
            "out",
            "overwrite",
        }
        if others:
            raise UserError(
                f"`{MERGE} OUT` joins parts, and takes no {', '.join(f'{name}=...' for name in sorted(others))}"
            )
        merged = merge_parts(given["out"], given["overwrite"])
        return merged, describe(merged)
    options = PrepareOptions(**given)
    check_applicable(options, given)
    if part is None:
        prepared = prepare_with_ray(options, ray) if ray else prepare(options)
        return prepared, describe(prepared)
    done = prepare_part(options, Part.named(part))
    text = f"{given['out']}: part {part} is finished ({done.blocks:,} blocks, {done.documents:,} documents, "
    return done, text + f"{done.tokens:,} tokens); when all are: moefoundry prepare {MERGE} {given['out']}"


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt the body as Ctrl-C does, once, so that what was begun is cleaned up."""
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


def describe(prepared: PreparedSummary) -> str:
    """Sum up for a person: one line for each split, and what was not prepared."""
    from moefoundry.data.left_out import describe_left_out, describe_share

    corpus = prepared.corpus
    state = "up to date" if prepared.up_to_date else "prepared"
    samples = "documents" if corpus.max_seq_len is None else f"samples of {corpus.max_seq_len} tokens"
    lines = [f"{prepared.out}: {state} (vocabulary {corpus.vocab_size}, {samples})"]
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
    if cut := sum(split.truncated_documents for split in corpus.splits.values()):
        tokens = sum(split.truncated_tokens for split in corpus.splits.values())
        lines.append(f"  truncated: {cut:,} documents, by {tokens:,} tokens")
    if corpus.left_out:
        share = f", {describe_share(corpus.left_out_share)} of the bytes" if corpus.left_out_share != 0 else ""
        lines.append(f"  left out{share}: {describe_left_out(corpus.left_out)}")
    elif corpus.skipped:
        lines.append(f"  left out: {corpus.skipped:,} blank or not UTF-8")
    if unknown := sum(split.unknown_tokens for split in corpus.splits.values()):
        tokens = sum(split.tokens - split.dropped_tokens for split in corpus.splits.values())
        lines.append(f"  unknown to the tokenizer: the text of {unknown:,} tokens, {unknown / tokens:.2%} of all")
    if prepared.ignored:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in prepared.ignored[:5])
        lines.append(f"  not part of it: {kinds}{', ...' if len(prepared.ignored) > 5 else ''} (--glob takes others)")
    return "\n".join(lines)
