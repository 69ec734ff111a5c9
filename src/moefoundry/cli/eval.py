"""``moefoundry eval``: a checkpoint solves code tasks, in one process. Heavy imports happen when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import flags_of, input_argument, json_option, local_path, options_named, output_option

if TYPE_CHECKING:
    from moefoundry.evaluation.generation import Sampling


@click.command("eval")
@input_argument("CHECKPOINT", "A checkpoint, or a run (its newest); a path or a URL.")
@click.option(
    "--humaneval", "tasks", type=local_path, required=True, metavar="FILE", help="HumanEval's problems, as JSONL."
)
@output_option("RESULTS", "JSONL file for the results, one sample a line.")
@click.option("--allow-code-execution", is_flag=True, help="Run what the model writes, in a sandbox.  [required]")
@click.option("-n", "--samples", type=int, default=1, metavar="N", help="Completions of each problem (default 1).")
@click.option("--max-new-tokens", type=int, default=512, metavar="N", help="Tokens of one at most (default 512).")
@click.option("--temperature", type=float, default=0.0, metavar="T", help="Divisor of the logits (default 0: greedy).")
@click.option("--top-p", type=float, default=1.0, metavar="P", help="Draw among the likeliest of probability P.")
@click.option("--seed", type=int, default=0, metavar="S", help="Another seed draws other tokens (default 0).")
@click.option("--timeout", type=float, default=3.0, metavar="S", help="Seconds of each program (default 3).")
@click.option("--workers", type=int, default=2, metavar="N", help="Programs run at the same time (default 2).")
@click.option("--ema", is_flag=True, help="Use the moving average of the parameters.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")
@json_option
def command(
    source: str,
    tasks: Path,
    output: Path,
    allow_code_execution: bool,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    timeout: float,
    workers: int,
    ema: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Complete the problems of HumanEval with a checkpoint, run them in a sandbox and estimate pass@k.

    The parts of the sandbox that this machine's kernel does not grant are named on standard error.
    """
    from tqdm import tqdm

    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.weights import Weights, load_model, named_checkpoint
    from moefoundry.cli.generate import device_named
    from moefoundry.config import UserError
    from moefoundry.evaluation.code_completion import complete_problems
    from moefoundry.evaluation.code_tasks import check_allowed, pass_at_k, read_problems, run_samples, write_results
    from moefoundry.evaluation.prompts import PromptTokenizer
    from moefoundry.evaluation.sandbox.run import Limits, statement

    flags = flags_of("allow_code_execution", "samples", "max_new_tokens", "temperature", "top_p", "workers", "device")
    flags["seconds"] = "--timeout"
    with checkpoint_at(source) as path, options_named(flags):
        check_allowed(allow_code_execution)
        limits = Limits(seconds=timeout)
        sampling = _draws(samples, max_new_tokens, temperature, top_p, seed)
        problems = read_problems(tasks)
        if not output.parent.is_dir():
            raise UserError(f"{output.parent}: no such directory")
        print(*(line for line in statement().splitlines() if not line.startswith("stopped")), sep="\n", file=sys.stderr)
        checkpoint, place = named_checkpoint(path), device_named(device)
        tokenizer = PromptTokenizer.of_checkpoint(checkpoint)
        model = load_model(checkpoint, Weights.ema if ema else Weights.trained).to(place)
        completions = complete_problems(
            model, tokenizer, problems.values(), samples=samples, sampling=sampling, max_new_tokens=max_new_tokens
        )
        results = run_samples(
            problems,
            tqdm(completions, "samples", len(problems) * samples, leave=False, disable=None),
            allow_code_execution=allow_code_execution,
            limits=limits,
            workers=workers,
        )
    write_results(output, results)
    estimates = pass_at_k(results)
    if as_json:
        found = {"checkpoint": str(checkpoint), "problems": len(problems), "samples": len(results), **estimates}
        print(json.dumps(found, indent=2))
        return
    print(f"{len(problems)} problems, {len(results)} samples: {output}")
    for name, value in estimates.items():
        print(f"{name} {value:.4f}")


def _draws(samples: int, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> Sampling:
    """Check the options of generation and return the draws that they ask for."""
    from moefoundry.config import UserError
    from moefoundry.evaluation.generation import Sampling

    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if samples > 1 and temperature == 0:
        raise UserError(f"samples={samples}: all would be the same without a --temperature above 0")
    try:
        return Sampling(temperature, None, top_p, seed)
    except ValueError as error:
        raise UserError(str(error)) from error
