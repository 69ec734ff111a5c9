"""The recipe's ``model.linear_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import REQUIRED, key

INTERVAL_OF_FULL = 4


class LinearBackend(StrEnum):
    """Ways to compute linear attention."""

    auto = "auto"
    torch = "torch"
    fla = "fla"


@dataclass
class LinearAttentionConfig:
    """Linear attention with the gated delta rule (Gated DeltaNet, arXiv 2412.06464), in some of the blocks."""

    full_attention_interval: int = key(
        INTERVAL_OF_FULL, "Of this many blocks the last has model.attention, the others linear attention.", ge=1
    )
    layers: list[int] | None = key(
        None, "Blocks (from 0) that have linear attention; null takes them from full_attention_interval.", ge=0
    )
    n_key_heads: int = key(
        REQUIRED,
        "Heads of queries and keys; divides n_value_heads.",
        customary="half of n_value_heads",
        ge=1,
        renamed_from=("linear_num_key_heads",),
    )
    n_value_heads: int = key(
        REQUIRED,
        "Heads of values, each with a state of its own.",
        customary="2 * d_model / 128",
        ge=1,
        renamed_from=("linear_num_value_heads",),
    )
    key_head_dim: int = key(128, "Width of a head's query and key.", ge=1, renamed_from=("linear_key_head_dim",))
    value_head_dim: int = key(128, "Width of a head's value.", ge=1, renamed_from=("linear_value_head_dim",))
    conv_width: int = key(
        4,
        "Tokens that the convolution of queries, keys and values sees, the token itself included.",
        ge=1,
        renamed_from=("linear_conv_kernel_dim",),
    )
    backend: LinearBackend = key(
        LinearBackend.auto,
        "How it is computed: torch is the reference, fla the kernels of flash-linear-attention, for BF16 on GPUs; auto "
        "takes these where they are installed.",
        free_on_resume=True,
        architecture=False,
    )

    def is_linear(self, index: int) -> bool:
        """Tell if the block ``index`` has linear attention."""
        if self.layers is not None:
            return index in self.layers
        return (index + 1) % self.full_attention_interval != 0
