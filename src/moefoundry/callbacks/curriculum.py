"""The stages of a run as it trains: their micro-batches, and metrics that tell them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from moefoundry.config import DataError
from moefoundry.config.curriculum import Stage, stage_at


class Curriculum(Callback):
    """Sets the micro-batch of each stage, and logs ``curriculum/stage``, counted from 1, and the size of its batches.

    Args:
        stages: The stages, in order.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self._said: Stage | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Announce a stage, and check that the batch is of it.

        Raises:
            DataError: It has another size: the loader is at another batch than the run.
        """
        stage = stage_at(self.stages, state.timestamp.batch.value)
        state.device_train_microbatch_size = stage.microbatch_size
        if stage is not self._said and dist.get_global_rank() == 0:
            print(stage.describe(), file=sys.stderr, flush=True)
        self._said = stage
        expected = (stage.batch_size // dist.get_world_size(), stage.seq_len)
        if (found := tuple(state.batch["input_ids"].shape)) != expected:
            raise DataError(f"batch {state.timestamp.batch.value + 1}: {found}, and stage {stage.name} has {expected}")
        logger.log_metrics(
            {
                "curriculum/stage": self.stages.index(stage) + 1,
                "curriculum/max_seq_len": stage.seq_len,
                "curriculum/global_train_batch_size": stage.batch_size,
            }
        )
