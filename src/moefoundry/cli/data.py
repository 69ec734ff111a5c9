"""``moefoundry data``: look at prepared data. Heavy imports happen when it runs."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moefoundry.cli.arguments import Group, json_option, local_path, positive

if TYPE_CHECKING:
    from moefoundry.data.show import Sample, Span, SplitView

STYLES: dict[str, dict[str, Any]] = {
    "text": {},
    "border": {"fg": "black", "bg": "yellow"},
    "sentinel": {"fg": "black", "bg": "cyan"},
    "prefix": {"fg": "blue"},
    "suffix": {"fg": "magenta"},
    "middle": {"fg": "green"},
}


@click.group("data", cls=Group)
def command() -> None:
    """Look at prepared data."""


@command.command("show")
@click.argument("directory", type=local_path, metavar="DIR")
@click.option("-n", "--samples", type=click.IntRange(0), default=3, metavar="N", help="Samples to show (default 3).")
@click.option("--skip", type=click.IntRange(0), default=0, metavar="N", help="Leave out the first N samples.")
@click.option("--split", default="train", metavar="NAME", help="train (default) or val.")
@click.option(
    "--max-tokens", type=positive, default="512", metavar="N", help="Tokens of a sample to show (default 512)."
)
@json_option
def show(directory: Path, samples: int, skip: int, split: str, max_tokens: int, as_json: bool) -> None:
    """Print samples of prepared data as text, with counts and a histogram of the documents' lengths.

    On a terminal the end of a document is yellow, tokens that are not to be predicted are dim, and of
    fill-in-the-middle the prefix is blue, the suffix magenta, the middle green and the tokens before them cyan.
    Elsewhere tokens that are not to be predicted are in [-brackets-].
    """
    from moefoundry.data.show import SplitView, bars, histogram

    view = SplitView.open(directory, split)
    bins = histogram(view.lengths())
    shown = list(islice(view.samples(), skip, skip + samples))
    if as_json:
        print(json.dumps(_record(view, split, shown) | {"lengths": [each._asdict() for each in bins]}, indent=2))
        return
    color = sys.stdout.isatty()
    for number, sample in enumerate(shown, start=skip):
        print(_bold(f"sample {number} of {split}: {len(sample.tokens):,} tokens", color))
        print(_text(view, sample, max_tokens, color))
    print(_bold(_counts(view, split), color))
    print(*bars(bins), sep="\n")


def _text(view: SplitView, sample: Sample, max_tokens: int, color: bool) -> str:
    from moefoundry.data.show import Sample

    head = Sample(sample.tokens[:max_tokens], None if sample.targets is None else sample.targets[:max_tokens])
    text = "".join(_span(span, color) for span in view.spans(head))
    more = len(sample.tokens) - len(head.tokens)
    return text + (_bold(f" ... and {more:,} tokens more\n", color) if more else "\n" * (not text.endswith("\n")))


def _span(span: Span, color: bool) -> str:
    end = "\n" if span.part == "border" else ""
    if color:
        return click.style(span.text, dim=span.ignored or None, **STYLES[span.part]) + end
    return (f"[-{span.text}-]" if span.ignored else span.text) + end


def _bold(text: str, color: bool) -> str:
    return click.style(text, bold=True) if color else text


def _counts(view: SplitView, split: str) -> str:
    from moefoundry.data.show import COUNTED_SAMPLES

    own = view.summary.splits[split]
    text = f"{split}: {own.documents:,} documents, {own.tokens:,} tokens, "
    if view.summary.max_seq_len is None:
        return text + "by their tokens:"
    text += f"{own.samples:,} samples of {view.summary.max_seq_len}; "
    return text + f"the pieces of documents in the first {min(own.samples, COUNTED_SAMPLES):,}, by their tokens:"


def _record(view: SplitView, split: str, samples: list[Sample]) -> dict[str, Any]:
    own = view.summary.splits[split]
    described = [
        {
            "tokens": sample.tokens.tolist(),
            "targets": None if sample.targets is None else sample.targets.tolist(),
            "spans": [span._asdict() for span in view.spans(sample)],
        }
        for sample in samples
    ]
    counts = {"documents": own.documents, "tokens": own.tokens, "samples": own.samples, "split": split}
    return counts | {"layout": view.summary.layout, "shown": described}
