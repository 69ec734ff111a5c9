"""``moefoundry generate``: a checkpoint continues a prompt, in one process. Heavy imports happen when it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import (
    Number,
    device_named,
    device_option,
    ema_option,
    flags_of,
    input_argument,
    json_option,
    options_named,
)

if TYPE_CHECKING:
    from moefoundry.evaluation.generation import Choice


@click.command("generate")
@input_argument("CHECKPOINT", "A checkpoint, or a run (its newest); a path or a URL.", former="--checkpoint")
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--prefix", metavar="TEXT", help="Text before a gap to fill, with a model of fill-in-the-middle.")
@click.option("--suffix", metavar="TEXT", help="Text behind the gap.")
@click.option("--max-new-tokens", type=int, default=128, metavar="N", help="Tokens to add at most (default 128).")
@click.option("--temperature", type=Number(), metavar="T", help="Draw by chance; above 1 is more even, 0 is greedy.")
@click.option("--top-k", type=int, metavar="K", help="Draw among the K most likely tokens.")
@click.option("--top-p", type=Number(), metavar="P", help="Draw among the likeliest tokens of probability P together.")
@click.option("--seed", type=int, metavar="S", help="Another seed draws other tokens (default 0).")
@ema_option
@device_option
@json_option
def command(
    source: str,
    prompt: str | None,
    prefix: str | None,
    suffix: str | None,
    max_new_tokens: int,
    ema: bool,
    device: str | None,
    as_json: bool,
    **sampling: float | None,
) -> None:
    """Continue a prompt, or fill a gap, with a checkpoint of any mesh, in fp32 in this process.

    The text streams to standard output and ends where the model ends it. Each token is the most likely one, unless
    --temperature, --top-k, --top-p or --seed asks for draws.
    """
    import warnings

    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.manifest import read_state
    from moefoundry.checkpoint.weights import Weights, load_model, named_checkpoint
    from moefoundry.evaluation.generation import generate
    from moefoundry.evaluation.infilling import Infiller
    from moefoundry.evaluation.prompts import PromptTokenizer

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is as it should be here
    if (prompt is None) == (prefix is None and suffix is None):
        raise click.UsageError("give --prompt, or --prefix and --suffix")
    before, after = prefix or "", suffix or ""
    names = flags_of("prompt", "prefix", "suffix", "max_new_tokens", "device", *sampling)
    with checkpoint_at(source) as path, options_named(names):
        choose, place = _choice(max_new_tokens, sampling), device_named(device)
        checkpoint = named_checkpoint(path)
        tokenizer = PromptTokenizer.of_checkpoint(checkpoint)
        if prompt is None:
            infiller = Infiller(tokenizer, checkpoint, read_state(checkpoint)["recipe"])
            asked, prompt_ids = {"prefix": before, "suffix": after}, infiller.prompt(before, after)
        else:
            asked, prompt_ids = {"prompt": prompt}, tokenizer.encode(prompt)
        model = load_model(checkpoint, Weights.ema if ema else Weights.trained).to(place)
        pieces = tokenizer.decode_stream(prompt_ids, generate(model, prompt_ids.to(place), max_new_tokens, choose))
        if as_json:
            print(json.dumps({"checkpoint": str(checkpoint), **asked, "completion": "".join(pieces)}, indent=2))
            return
        print(before if prompt is None else prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(after)


def _choice(max_new_tokens: int, sampling: dict[str, float | None]) -> Choice:
    """Choose the most likely token, or as the options of sampling say."""
    from moefoundry.config import UserError
    from moefoundry.evaluation.generation import Sampling, most_likely

    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        return Sampling(**given).choice() if given else most_likely  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from error
