"""Scores, choice of experts, their weights and the means over tokens, from the router's logits, as one Triton kernel.

By operators these are about twenty passes over [T, E], and a top-k that is slow for short rows. The kernel reads the
logits once, and the backward pass reads them once more. Only logits and chosen experts are kept. The host never waits.

Experts are chosen in K rounds; each takes the largest of those left, and of equal ones the first (``torch.topk`` takes
any). Without a bias the logits are compared: scores are in their order, and can only be equal where logits differ. NaN
is the largest, so that ids are valid whatever the logits are. Groups are chosen in the same way before (group-limited
routing): each column of a row has its group's sum, and a round takes a whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefoundry.ops.kernel_choice import kernels_run

if TYPE_CHECKING:
    from types import ModuleType

MAX_EXPERTS = 1024


def router_kernels(logits_TE: Tensor) -> ModuleType | None:
    """Give the module of functions over the kernels if they take these logits and run.

    They take fp32 of at least one token and at most ``MAX_EXPERTS`` experts.
    """
    if logits_TE.dtype != torch.float32 or not len(logits_TE) or not 0 < logits_TE.shape[1] <= MAX_EXPERTS:
        return None
    if not kernels_run(logits_TE.device):
        return None
    from moefoundry.ops.router_kernels import function

    return function
