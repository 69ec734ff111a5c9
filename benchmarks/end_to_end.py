"""Training speed of the quickstart's model against LLM Foundry's MoE, in tokens a second.

Both train through their own entry point and Composer's ``Trainer``, each in a process of its own that stays alive, and
take turns: a few batches of one while the other waits, then the other. A turn's time covers everything in the training
loop (data, forward, backward, clipping, optimizer, callbacks); start-up and the first batches do not count. Same data,
batch, micro-batch, optimizer, precision, ranks, threads and allocator; ``llm_foundry.py`` says how the models are
matched and what is chosen in LLM Foundry's favour.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.harness import ROOT, Comparison
from benchmarks.llm_foundry import Match, matches
from benchmarks.processes import NODE, Channel, accept, failure, free_port, listen, running
from benchmarks.worker import RECIPE
from moefoundry.config import load_recipe

SIDES = ("moefoundry", "llm_foundry")
TARGET = 1.2
WARMUP_BATCHES = 3


def compare(threads: int, ranks: int = 1, rounds: int = 7, batches: int = 4, quick: bool = False) -> list[Comparison]:
    """Measure the quickstart's model against every match of it.

    Args:
        threads: Of both sides, over all ranks.
        ranks: Processes of each side.
        rounds, batches: Turns of each side, and batches of a turn.
        quick: One match, two rounds of one batch.
    """
    if quick:
        rounds, batches = 2, 1
    recipe = load_recipe(RECIPE)
    tokens = batches * recipe.global_train_batch_size * recipe.max_seq_len
    comparisons: list[Comparison] = []
    for index, match in enumerate(matches(recipe.model)[: 1 if quick else None]):
        seconds, parameters = measure(index, threads, ranks, rounds, batches)
        ours, theirs = ([tokens / value for value in seconds[side]] for side in SIDES)
        comparisons.append(
            Comparison(
                benchmark="training",
                case=f"{describe(match, parameters)}; {ranks} x {threads // ranks} threads",
                unit="tokens/s",
                peer="LLM Foundry torch_dmoe",
                ours=ours,
                theirs=theirs,
                target=TARGET,
            )
        )
    return comparisons


def describe(match: Match, parameters: dict[str, int]) -> str:
    """The match, and the parameters of both sides in millions."""
    ours, theirs = (f"{parameters[side] / 1e6:.1f}" for side in SIDES)
    return f"quickstart ({ours}M) against {match.label} (top-k {match.top_k}, F {match.hidden}, {theirs}M)"


def measure(
    match: int, threads: int, ranks: int, rounds: int, batches: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every turn of both sides, and their numbers of parameters."""
    turns = [WARMUP_BATCHES] + [batches] * rounds
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {
            side: stack.enter_context(worker(side, directory, match, 1 + sum(turns), threads, ranks)) for side in SIDES
        }
        parameters = {side: channel.receive()["parameters"] for side, channel in workers.items()}
        for turn in turns:
            for side, channel in workers.items():
                channel.send(turn)
                seconds[side].append(channel.receive()["seconds"])
        for channel in workers.values():
            channel.send(0)
    return {side: values[1:] for side, values in seconds.items()}, parameters


@contextmanager
def worker(side: str, directory: Path, match: int, batches: int, threads: int, ranks: int) -> Iterator[Channel]:
    """A training process (or ``ranks`` of them) and the channel to its first rank."""
    address, log = str(directory / side), directory / f"{side}.log"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", free_port()]
    command += ["-m", "benchmarks.worker", side, address, str(match), str(batches), str(ranks)]
    env = os.environ | NODE | {"OMP_NUM_THREADS": str(threads // ranks), "CUDA_VISIBLE_DEVICES": ""}
    with listen(address) as server, running(command, env, log, cwd=ROOT.parent, patience=20) as process:
        channel = accept(server, process, log)
        try:
            yield channel
        except EOFError:
            raise failure(process, log) from None
