"""``moefoundry generate``: a checkpoint continues a prompt, in one process. Heavy imports happen when it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import (
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
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue.")
@click.option("--max-new-tokens", type=int, default=128, metavar="N", help="Tokens to add at most (default 128).")
@click.option("--temperature", type=float, metavar="T", help="Draw by chance; above 1 is more even, 0 is greedy.")
@click.option("--top-k", type=int, metavar="K", help="Draw among the K most likely tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw among the likeliest tokens of probability P together.")
@click.option("--seed", type=int, metavar="S", help="Another seed draws other tokens (default 0).")
@ema_option
@device_option
@json_option
def command(
    source: str,
    prompt: str,
    max_new_tokens: int,
    ema: bool,
    device: str | None,
    as_json: bool,
    **sampling: float | None,
) -> None:
    """Continue a prompt with a checkpoint of any mesh, in fp32 in this process.

    The text streams to standard output and ends where the model ends it. Each token is the most likely one, unless
    --temperature, --top-k, --top-p or --seed asks for draws.
    """
    import warnings

    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.weights import Weights, load_model, named_checkpoint
    from moefoundry.evaluation.generation import generate
    from moefoundry.evaluation.prompts import PromptTokenizer

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is as it should be here
    with checkpoint_at(source) as path, options_named(flags_of("prompt", "max_new_tokens", "device", *sampling)):
        choose, place = _choice(max_new_tokens, sampling), device_named(device)
        checkpoint = named_checkpoint(path)
        tokenizer = PromptTokenizer.of_checkpoint(checkpoint)
        prompt_ids = tokenizer.encode(prompt)
        model = load_model(checkpoint, Weights.ema if ema else Weights.trained).to(place)
        pieces = tokenizer.decode_stream(prompt_ids, generate(model, prompt_ids.to(place), max_new_tokens, choose))
        if as_json:
            found = {"checkpoint": str(checkpoint), "prompt": prompt, "completion": "".join(pieces)}
            print(json.dumps(found, indent=2))
            return
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


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
