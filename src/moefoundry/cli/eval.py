"""``moefoundry eval``: what a model can do. Heavy imports happen when it runs; ``evaluations.py`` has the kinds."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from moefoundry.cli.arguments import (
    Number,
    device_option,
    ema_option,
    flags_of,
    input_argument,
    json_option,
    local_path,
    options_named,
)
from moefoundry.cli.world import join_world

OF_CODE = ("allow_code_execution", "samples", "max_new_tokens", "temperature", "top_p", "seed", "timeout", "workers")


@dataclass(frozen=True)
class Request:
    """Arguments of the command: the kind of evaluation, and its limits.

    Attributes:
        batch_size: Sequences of one forward pass of one rank.
        max_seq_len: Tokens of a sequence at most; None is the recipe's, or what ``config.json`` allows.
        limit: Examples of each task at most.
        output: File for samples.
        code: Options of HumanEval.
    """

    tasks: Path | None
    humaneval: Path | None
    data: Path | None
    harness: str | None
    gauntlet: Path | None
    harness_include: Path | None
    num_fewshot: int | None
    batch_size: int
    max_seq_len: int | None
    limit: int | None
    output: Path | None
    code: dict[str, Any]


@click.command("eval")
@input_argument("CHECKPOINT", "A checkpoint, a run (its newest) or a Hugging Face directory; a path or a URL.")
@click.argument("tasks", type=local_path, required=False, metavar="[TASKS]", help="YAML file with icl_tasks.")
@click.option(
    "-o", "--output", type=local_path, metavar="RESULTS", help="JSONL file for the results, one sample a line."
)
@click.option("--gauntlet", type=local_path, metavar="FILE", help="YAML file with eval_gauntlet: averages of TASKS.")
@click.option("--data", type=local_path, metavar="DIR", help="Held-out loss: split val of this prepared corpus.")
@click.option("--harness", metavar="NAME,...", help="Tasks of lm-evaluation-harness (extra eval).")
@click.option("--harness-include", type=local_path, metavar="DIR", help="Directory of further task files of --harness.")
@click.option("--num-fewshot", type=int, metavar="N", help="Solved examples of --harness (default: the task's).")
@click.option("--humaneval", type=local_path, metavar="FILE", help="HumanEval's problems, as JSONL.")
@click.option("--batch-size", type=int, default=8, metavar="N", help="Sequences of a forward pass (default 8).")
@click.option(
    "--max-seq-len",
    type=int,
    metavar="N",
    help="Tokens of a sequence at most (default: the run's; or 2048, or fewer if config.json says fewer).",
)
@click.option("--limit", type=int, metavar="N", help="Examples of each task at most.")
@click.option("--mesh", metavar="MAPPING", help="With several ranks, such as '{expert: 2}' (default: all shard).")
@click.option("--allow-code-execution", is_flag=True, help="--humaneval: run what the model writes, in a sandbox.")
@click.option("-n", "--samples", type=int, default=1, metavar="N", help="Completions of each problem (default 1).")
@click.option("--max-new-tokens", type=int, default=512, metavar="N", help="Tokens of one at most (default 512).")
@click.option(
    "--temperature", type=Number(), default=0.0, metavar="T", help="Divisor of the logits (default 0: greedy)."
)
@click.option("--top-p", type=Number(), default=1.0, metavar="P", help="Draw among the likeliest of probability P.")
@click.option("--seed", type=int, default=0, metavar="S", help="Another seed draws other tokens (default 0).")
@click.option("--timeout", type=Number(), default=3.0, metavar="S", help="Seconds of each program (default 3).")
@click.option("--workers", type=int, default=2, metavar="N", help="Programs run at the same time (default 2).")
@ema_option
@device_option
@json_option
def command(source: str, ema: bool, device: str | None, mesh: str | None, as_json: bool, **options: Any) -> int:
    """Evaluate in-context tasks, a held-out loss, tasks of lm-evaluation-harness, or HumanEval.

    Without any of these it evaluates the held-out split and the tasks of the checkpoint's own recipe. Started with
    torchrun or srun, the ranks share the model and the work; the results are the same.

    Programs that a model writes run only with --allow-code-execution (of tasks: with their key allow_code_execution).
    The parts of the sandbox that this machine's kernel does not grant are named on standard error.
    """
    code = {name: options.pop(name) for name in OF_CODE}
    request = Request(**options, code=code)
    kinds = {"TASKS": request.tasks, "--data": request.data, "--harness": request.harness}
    kinds["--humaneval"] = request.humaneval
    if len(given := [name for name, value in kinds.items() if value is not None]) > 1:
        raise click.UsageError(f"{' and '.join(given)}: give one of them")
    if request.humaneval is not None and request.output is None:
        raise click.UsageError("--humaneval needs -o RESULTS")
    if request.data is not None and request.output is not None:
        raise click.UsageError("-o: --data has no samples to write")
    flags = flags_of(*OF_CODE, "device", "ema", "batch_size", "max_seq_len", "limit", "harness", "data", "mesh")
    flags["gauntlet"] = "--gauntlet"
    flags["seconds"] = "--timeout"
    join_world(os.environ)

    from moefoundry.cli.evaluations import check, evaluate, print_found, save, shared_world
    from moefoundry.config.errors import EXIT_USER_ERROR, UserError
    from moefoundry.pretrained import evaluated_at

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is as it should be here
    try:
        with options_named(flags):
            check(request)
            meshes, place = shared_world(mesh, device)
            with evaluated_at(source, meshes=meshes, device=place, ema=ema) as evaluated:
                found, samples = evaluate(evaluated, request)
    except UserError:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        time.sleep(1)  # launchers end every rank when one ends: let the one that speaks do so
        return EXIT_USER_ERROR
    if int(os.environ.get("RANK", 0)) == 0:
        print_found(found) if not as_json else print(json.dumps(found, indent=2))
        if request.output is not None and samples is not None:
            save(samples, request.output)
    return 0
