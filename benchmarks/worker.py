"""A training process that runs when it is told to: ``python -m benchmarks.worker SIDE ADDRESS MATCH BATCHES RANKS``.

It trains through its side's own entry point (``moefoundry.build.build_trainer``, ``llmfoundry``'s ``train``) with one
more Composer callback, the same for both: at the end of a batch it reports the seconds since it was let go, and waits.
So two trainers take turns, a few batches each, without paying for their start again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.llm_foundry import Match, matches, register_fused_adamw, training_config
from benchmarks.processes import connect
from moefoundry.config import Recipe, load_recipe

RECIPE = ROOT.parent / "configs" / "quickstart.yaml"
PACKED = "train_loader.dataset.local=data/quickstart-packed"
"""Data of the recipe as LLM Foundry's loader reads them, too: samples packed to its ``max_seq_len``."""
NEVER = "1000000ba"


def turnstile(address: str) -> type[Any]:
    """The class of the callback that waits. Only rank 0 does; the others wait for it in their next collective."""
    from composer.core import Callback, State
    from composer.loggers import Logger

    class Turnstile(Callback):
        def __init__(self) -> None:
            self.channel = connect(address) if int(os.environ.get("RANK", "0")) == 0 else None
            self.batches_left = 1
            self.start = time.perf_counter()

        def batch_end(self, state: State, logger: Logger) -> None:
            self.batches_left -= 1
            if self.channel is None or self.batches_left:
                return
            parameters = sum(parameter.numel() for parameter in state.model.parameters())
            self.channel.send({"seconds": time.perf_counter() - self.start, "parameters": parameters})
            self.batches_left = self.channel.receive()
            self.start = time.perf_counter()

    return Turnstile


def train_moefoundry(recipe: Recipe, callback: type[Any]) -> None:
    """Train as ``scripts/train.py`` does."""
    from moefoundry.build import build_trainer

    trainer = build_trainer(recipe)
    trainer.state.callbacks.append(callback())
    trainer.fit()
    trainer.close()


def train_llm_foundry(recipe: Recipe, match: Match, callback: type[Any]) -> None:
    """Train as LLM Foundry's ``scripts/train/train.py`` does."""
    from llmfoundry.command_utils import train
    from llmfoundry.registry import callbacks
    from omegaconf import OmegaConf

    register_fused_adamw()
    callbacks.register("turnstile", func=callback)
    config = training_config(recipe, match)
    config["callbacks"]["turnstile"] = {}
    train(OmegaConf.create(config))


def main(side: str, address: str, match_index: int, batches: int, ranks: int) -> None:
    match = matches(load_recipe(RECIPE).model)[match_index]
    with tempfile.TemporaryDirectory() as run_dir:
        overrides = [
            PACKED,
            *match.overrides,
            f"max_duration={batches}ba",
            "scheduler.t_warmup=1ba",
            "scheduler.timing=composer",
            f"run_dir={run_dir}",
            f"eval_interval={NEVER}",
            f"save_interval={NEVER}",
            "eval_loader=null",
            "callbacks.report=null",
            "progress_bar=false",
            "log_to_console=false",
        ]
        recipe = load_recipe(RECIPE, overrides, world_size=ranks)
        if side == "moefoundry":
            train_moefoundry(recipe, turnstile(address))
        else:
            train_llm_foundry(recipe, match, turnstile(address))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:6]))
