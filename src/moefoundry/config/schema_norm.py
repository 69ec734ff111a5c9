"""The recipe's ``model.norm``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import key


class NormKind(StrEnum):
    """Kinds of normalization."""

    rmsnorm = "rmsnorm"
    layernorm = "layernorm"


class NormPosition(StrEnum):
    """Places of a block's norms."""

    before = "before"
    after = "after"
    both = "both"


@dataclass
class NormConfig:
    """Normalization layers."""

    kind: NormKind = key(
        NormKind.rmsnorm,
        "Normalization layer.",
        renamed_from=("norm_type", "normalization"),
        other_values={
            "low_precision_rmsnorm": "rmsnorm",
            "rms_norm": "rmsnorm",
            "low_precision_layernorm": "layernorm",
            "layer_norm": "layernorm",
        },
    )
    eps: float = key(
        1.0e-6,
        "Added to the mean square before the root.",
        gt=0,
        renamed_from=("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon"),
    )
    zero_centered: bool = key(
        False,
        "Multiply by 1 plus the weights, which begin at 0; norms inside attention, too.",
        renamed_from=("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    )
    bias: bool = key(False, "Norms of blocks and of the output add a learned bias; those inside attention do not.")
    position: NormPosition = key(
        NormPosition.before, "Norms of a block stand before attention and FFN, after them (OLMo-2), or at both places."
    )
