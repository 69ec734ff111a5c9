"""Linear attention with the gated delta rule: Gated DeltaNet (arXiv 2412.06464), as in Qwen3-Next and Qwen3.5.

    x -> qkv_proj -> convolution -> SiLU -> q, k, v ;  strength = sigmoid(beta_proj x) ;  decay from decay_proj x
    state of each head, by ops.gated_delta_rule -> norm of each head -> times SiLU(gate_proj x) -> o_proj

It takes no positions: the state and the convolution know the order of tokens. Letters are those of
:mod:`moefoundry.ops.gated_delta_rule`; C is the width of queries, keys and values of all heads together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.config import LinearAttentionConfig, LinearBackend, ModelConfig, UserError
from moefoundry.model.attention import Attention
from moefoundry.model.cache import LayerCache
from moefoundry.model.context import AttentionContext
from moefoundry.model.norm import RMSNorm
from moefoundry.ops.gated_delta_rule import gated_delta_rule, has_fused
from moefoundry.ops.short_conv import causal_conv
from moefoundry.ops.swiglu import swiglu
from moefoundry.ops.wide_linear import widened


class Decay(nn.Module):
    """Decay of the state by a token; a module, so that FSDP can leave its parameters in fp32.

    A state halves in some tokens or in thousands, which narrower parameters could not tell apart.

    Attributes:
        A_log: [H]. Logarithm of a head's rate; rates are drawn from U(0.01, 16), as in transformers.
        dt_bias: [H]. Added to a token's step before softplus; begins with 1.
    """

    DT_BIAS = 1.0
    SLOWEST, FASTEST = 0.01, 16.0

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def forward(self, step_BSH: Tensor) -> Tensor:
        """Compute the logarithm of the decay, [B, S, H], at most 0, in fp32 or wider."""
        return -widened(self.A_log).exp() * F.softplus(widened(step_BSH) + self.dt_bias)

    def draw(self, rate: Tensor, generator: torch.Generator) -> Tensor:
        """Fill a slice of ``A_log``."""
        return rate.uniform_(self.SLOWEST, self.FASTEST, generator=generator).log_()


class ShortConv(nn.Module):
    """Causal convolution of each channel by itself, then SiLU.

    Attributes:
        weight: [C, 1, W].
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(self, x_BSC: Tensor, documents_BS: Tensor | None, before_BPC: Tensor | None) -> Tensor:
        """Compute [B, S, C] -> [B, S, C], as :func:`~moefoundry.ops.short_conv.causal_conv` does."""
        return F.silu(causal_conv(x_BSC, self.weight, documents_BS, before_BPC))


class GatedDeltaNet(Attention):
    """Linear attention with the gated delta rule.

    ``qkv_proj`` gives the queries of all heads, then their keys, then their values. The norm of the heads has weights
    about 1, whatever ``model.norm.zero_centered``.

    Raises:
        UserError: The recipe asks for kernels that are not installed.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        cfg, d_model = model.linear_attention, model.d_model
        assert cfg is not None, "a block has linear attention only where the recipe declares it"
        self.fused = wants_fused(cfg)
        self.head_dims = cfg.key_head_dim, cfg.value_head_dim
        keys, values = cfg.n_key_heads * cfg.key_head_dim, cfg.n_value_heads * cfg.value_head_dim
        self.widths = [keys, keys, values]
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.gate_proj = nn.Linear(d_model, values, bias=False)
        self.beta_proj = nn.Linear(d_model, cfg.n_value_heads, bias=False)
        self.decay_proj = nn.Linear(d_model, cfg.n_value_heads, bias=False)
        self.decay = Decay(cfg.n_value_heads)
        self.conv = ShortConv(sum(self.widths), cfg.conv_width)
        self.head_norm = RMSNorm(cfg.value_head_dim, model.norm.eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        before_BPC, state_BHKV = cache.tensors if cache is not None and cache.tensors else (None, None)
        inputs_BSC = self.qkv_proj(x_BSD)
        parts = self.conv(inputs_BSC, context.documents, before_BPC).split(self.widths, dim=-1)
        key_dim, value_dim = self.head_dims
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in zip(parts, (key_dim, key_dim, value_dim), strict=True))
        log_decay_BSH, beta_BSH = self.decay(self.decay_proj(x_BSD)), self.beta_proj(x_BSD).sigmoid()
        out_BSHV, state_BHKV = gated_delta_rule(
            q, k, v, log_decay_BSH, beta_BSH, context.documents, state_BHKV, self.fused
        )
        if cache is not None:
            cache.tensors = self._last_inputs(inputs_BSC, before_BPC), state_BHKV
        return self.o_proj(swiglu(self.gate_proj(x_BSD), self.head_norm(out_BSHV).flatten(-2)))

    def _last_inputs(self, inputs_BSC: Tensor, before_BPC: Tensor | None) -> Tensor:
        """Give the W - 1 inputs that the next token's convolution sees, [B, W - 1, C]; zeros before the first."""
        kept = self.conv.weight.shape[-1] - 1
        if before_BPC is None:
            before_BPC = inputs_BSC.new_zeros(len(inputs_BSC), kept, inputs_BSC.shape[2])
        together_BLC = torch.cat([before_BPC, inputs_BSC], dim=1)
        return together_BLC[:, together_BLC.shape[1] - kept :]


def wants_fused(cfg: LinearAttentionConfig) -> bool:
    """Tell if the kernels are to be used, where tensors allow it.

    Raises:
        UserError: The recipe asks for them, and they are not installed.
    """
    if cfg.backend == LinearBackend.fla and not has_fused():
        raise UserError(
            "model.linear_attention.backend: fla, and the package flash-linear-attention is not installed; "
            "install it, or leave the backend at auto or torch"
        )
    return cfg.backend != LinearBackend.torch and has_fused()
