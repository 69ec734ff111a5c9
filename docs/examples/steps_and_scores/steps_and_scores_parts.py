"""The three parts themselves: see ``steps_and_scores``."""

import time

from composer.core import Callback

from moefoundry.model.losses import LogitsLoss


class StepsPerSecond(Callback):
    def __init__(self, cfg, recipe):
        self.every, self.since = cfg.every, time.perf_counter()

    def batch_end(self, state, logger):
        if state.timestamp.batch.value % self.every == 0:
            now = time.perf_counter()
            logger.log_metrics({"throughput/steps_per_sec": self.every / (now - self.since)})
            self.since = now


def tempered_softmax(cfg):
    return lambda logits_TE: (logits_TE / cfg.temperature).softmax(dim=-1)


def smoothing(cfg):  # the mean cross entropy to all tokens
    return LogitsLoss(lambda logits_NV, targets_N: -logits_NV.log_softmax(dim=-1).mean(dim=-1))
