"""``moefoundry reference``: a checkpoint scores preference data, in one process. Heavy imports happen when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from moefoundry.cli.arguments import check_writable, flags_of, input_argument, local_path, options_named


@click.command("reference")
@input_argument("CHECKPOINT", "The reference: a checkpoint, or a run (its newest); a path or a URL.")
@click.argument("data", type=local_path, metavar="DATA", help="Directory of `prepare --preferences`.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")
@click.option("--overwrite", is_flag=True, help="Replace the scores of another reference.")
def command(source: str, data: Path, device: str | None, overwrite: bool) -> None:
    """Compute the log-probabilities of a frozen reference, for the recipe's key dpo, and store them beside the data.

    Each split gets reference.npy, and reference.json with digests of the data and of the checkpoint. A split that has
    them already is left as it is.
    """
    from moefoundry.checkpoint.base import digest_of_tensors
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.weights import load_model, named_checkpoint
    from moefoundry.cli.arguments import device_named
    from moefoundry.config.errors import UserError
    from moefoundry.data.reference import VALUES, reference_beside, write_reference
    from moefoundry.data.summary import read_corpus_summary
    from moefoundry.evaluation.reference import score_pairs

    with checkpoint_at(source) as path, options_named(flags_of("device", "overwrite")):
        place, summary = device_named(device), read_corpus_summary(data)
        checkpoint = named_checkpoint(path)
        digest = digest_of_tensors(checkpoint)
        there = {split: reference_beside(data / split) for split in summary.splits}
        for split, other in there.items():
            if other not in (None, digest) and not overwrite:
                raise UserError(f"{data / split}: has scores of another reference; overwrite=True replaces them")
        unscored = [split for split, other in there.items() if other != digest or overwrite]
        for split in unscored:
            check_writable(data / split / f".{VALUES}")
        model = None
        for split in there:
            if split not in unscored:
                print(f"{data / split}: up to date, scored by {checkpoint}")
                continue
            model = model or load_model(checkpoint).to(place)
            log_probs = score_pairs(model, data, split)
            write_reference(data / split, log_probs, digest)
            print(f"{data / split}: {len(log_probs)} pairs, scored by {checkpoint}")
