"""``moefoundry generate``: a checkpoint continues a prompt, in one process. Heavy imports happen in :func:`run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import place

if TYPE_CHECKING:
    import torch

    from moefoundry.evaluation.generation import Choice

DESCRIPTION = """\
Continue a prompt with a checkpoint of any mesh, in fp32 in this process; the text streams to standard output and ends
where the model ends it. Without --temperature, or with 0, each token is the most likely one."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate", help="continue a prompt with a checkpoint", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", type=place, required=True, metavar="PLACE", help="a checkpoint, or a run (its newest); or a URL"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add (default 128)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="draw by chance; above 1 is more even (0: greedy)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likely tokens of probability P in all")
    parser.add_argument("--seed", type=int, metavar="S", help="another seed draws other tokens (default 0)")
    parser.add_argument("--ema", action="store_true", help="with the moving average of the parameters")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.fetch import checkpoint_at

    with checkpoint_at(args.checkpoint) as path:
        return _continue(args, path)


def _continue(args: argparse.Namespace, path: Path) -> int:
    import warnings

    from moefoundry.checkpoint.weights import Weights, load_model, named_checkpoint, read_model_config
    from moefoundry.config import UserError
    from moefoundry.evaluation.generation import generate
    from moefoundry.evaluation.prompts import PromptTokenizer

    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    choose, device = _choice(args), _device(args.device)
    checkpoint = named_checkpoint(path)
    tokenizer = PromptTokenizer.open(_tokenizer_dir(checkpoint), read_model_config(checkpoint).vocab_size)
    try:
        prompt_ids = tokenizer.encode(args.prompt)
    except UserError as error:
        raise UserError(f"--{error}") from error
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is as it should be here
    model = load_model(checkpoint, Weights.ema if args.ema else Weights.trained).to(device)

    print(args.prompt, end="", flush=True)
    new_ids = generate(model, prompt_ids.to(device), args.max_new_tokens, choose)
    for piece in tokenizer.decode_stream(prompt_ids, new_ids):
        print(piece, end="", flush=True)
    print()
    return 0


def _choice(args: argparse.Namespace) -> Choice:
    """The most likely token, or what the options of sampling say."""
    from moefoundry.config import UserError
    from moefoundry.evaluation.generation import Sampling, most_likely

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return most_likely
    try:
        return Sampling(**given).choice()
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error


def _device(name: str | None) -> torch.device:
    import torch

    from moefoundry.config import UserError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _tokenizer_dir(checkpoint: Path) -> Path:
    from moefoundry.checkpoint.manifest import read_state
    from moefoundry.checkpoint.weights import tokenizer_of
    from moefoundry.config import UserError

    directory = tokenizer_of(checkpoint, read_state(checkpoint)["recipe"])
    if directory is None:
        raise UserError(f"{checkpoint}: the checkpoint has no tokenizer, and its recipe names none (tokenizer.name)")
    return directory
