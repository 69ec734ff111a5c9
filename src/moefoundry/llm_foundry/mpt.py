"""``ffn_type: moefoundry_moe`` inside an MPT of LLM Foundry, which finds it by the entry points of this package.

A builder of FFNs returns a module of one tensor, and MPT's loss knows the balance loss of MegaBlocks alone. So
``mpt_causal_lm`` is an entry point, too: LLM Foundry's own model, whose loss has what its MoE layers add, and which
tells them what is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from llmfoundry.models.layers.blocks import MPTBlock
from llmfoundry.models.layers.ffn import resolve_ffn_hidden_size
from llmfoundry.models.mpt.modeling_mpt import ComposerMPTCausalLM
from llmfoundry.models.utils.param_init_fns import stacked_param_init_helper
from torch import Tensor, nn
from torch.func import functional_call

from moefoundry.config import AuxLossScope, ConfigError, MoEConfig, Problem, load_model
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.layer import MoELayer, RoutingStats
from moefoundry.moe.router import Router

FFN_TYPE = "moefoundry_moe"


class MoEFFN(nn.Module):
    """An MoE layer that returns its output alone, as MPT wants it.

    Attributes:
        losses: Balance and z loss of the last forward pass in training, weighted; None once they are taken.
        routing: Statistics of that pass.
        taken: The model adds ``losses`` to its own. Without it, training is refused.
        real_T: Places of the tokens that are no padding, as :class:`~moefoundry.moe.layer.MoELayer` takes them; the
            model sets it before each forward pass of the block.
    """

    def __init__(self, d_model: int, cfg: MoEConfig, device: str | None) -> None:
        super().__init__()
        with torch.device(device or "cpu"):
            self.moe = MoELayer(d_model, cfg)
        if self.moe.shared_experts is not None:
            residual: Any = self.moe.shared_experts.down_proj
            residual._is_residual = True  # LLM Foundry divides its initial weights
        self.cfg = cfg
        self.losses: tuple[Tensor, Tensor] | None = None
        self.routing: RoutingStats | None = None
        self.taken = False
        self.real_T: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute [B, S, D] -> [B, S, D], or [T, D] -> [T, D] where padding was removed.

        Raises:
            RuntimeError: In training, if the model would lose the balance loss.
        """
        if self.training and not self.taken:
            raise RuntimeError(f"ffn_type {FFN_TYPE}: only model.name mpt_causal_lm adds its balance loss in training")
        out, stats = self._compute(x, self.real_T) if x.dim() == 3 else self._compute(x.unsqueeze(0), None)
        if self.training and torch._C._current_graph_task_id() == -1:  # not a recomputation in backward
            weights = self.cfg.balance
            self.losses = weights.aux_loss_weight * stats.balance_loss, weights.z_loss_weight * stats.z_loss
            self.routing = stats
        return out.view_as(x).to(x.dtype)

    def _compute(self, x_BSD: Tensor, real_T: Tensor | None) -> Any:
        """Run the layer; under autocast with its dtype, but for the gate, which computes in fp32."""
        device = x_BSD.device.type
        if not torch.is_autocast_enabled(device):
            return self.moe(x_BSD, real_T)
        dtype = torch.get_autocast_dtype(device)
        weights = {
            name: weight if name.startswith("router.") else weight.to(dtype)
            for name, weight in self.moe.named_parameters()
        }
        with torch.autocast(device, enabled=False):
            return functional_call(self.moe, weights, (x_BSD.to(dtype), real_T))


def build_moe_ffn(
    d_model: int,
    expansion_ratio: float,
    ffn_hidden_size: int | None = None,
    device: str | None = None,
    bias: bool = True,
    fc_type: object = None,
    **moe: object,
) -> nn.Module:
    """Build the MoE layer of an MPT block.

    Args:
        d_model: D.
        expansion_ratio: F / D, where neither ``ffn_hidden_size`` nor ``expert_hidden_size`` says F.
        ffn_hidden_size: F.
        device: Device of the weights.
        bias: Not used: experts have no biases.
        fc_type: Not used.
        moe: Keys of this project's ``model.moe``.

    Raises:
        ConfigError: They are not valid, or ask for what this project's own training loop does after each step.
    """
    moe.setdefault("expert_hidden_size", resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size))
    layer = {"d_model": d_model, "vocab_size": 2, "n_layers": 1, "n_dense_layers": 0, "moe": moe}
    layer["attention"] = {"n_heads": 1, "n_kv_heads": 1}
    try:
        cfg = load_model(layer).moe
    except ConfigError as error:
        raise ConfigError([_in_ffn_config(problem) for problem in error.problems]) from None
    balance = cfg.balance
    if balance.bias_update_rate or balance.aux_loss_scope == AuxLossScope.global_batch:
        key = "bias_update_rate" if balance.bias_update_rate else "aux_loss_scope"
        message = f"{getattr(balance, key)} needs moefoundry's own trainer, and a recipe of its own"
        raise ConfigError([Problem(f"model.ffn_config.balance.{key}", message)])
    return MoEFFN(d_model, cfg, device)


def _in_ffn_config(problem: Problem) -> Problem:
    """Name the key as it stands in a recipe of LLM Foundry."""
    here, there = "model.moe", "model.ffn_config"
    suggestion = problem.suggestion.replace(here, there)
    return Problem(problem.path.replace(here, there), problem.message, problem.allowed, suggestion)


def init_moe(
    module: nn.Module,
    init_fn_: Callable[[Tensor], object],
    div_is_residual: float = 1.0,
    init_div_is_residual: object = False,
    **options: object,
) -> bool:
    """Initialize the stacked experts, each by its own fan-in and fan-out, and the bias of the router.

    Args:
        module: Any module of the model.
        init_fn_: Initializes one weight in place.
        div_is_residual: Divides the weights of what is added to the residual stream.
        init_div_is_residual: False: nothing is divided.
        options: Not used.

    Returns:
        True if nothing of the module itself is left to initialize.
    """
    if isinstance(module, Router):
        if module.expert_bias is not None:
            module.expert_bias.zero_()
        return True
    if not isinstance(module, GroupedExperts):
        return False
    for weight_EXY in (module.gate_proj, module.up_proj, module.down_proj):
        stacked_param_init_helper(weight_EXY, init_fn_, 0)
    with torch.no_grad():
        for bias in (module.gate_proj_bias, module.up_proj_bias, module.down_proj_bias):
            if bias is not None:
                bias.zero_()
    if init_div_is_residual is not False:
        with torch.no_grad():
            module.down_proj.div_(div_is_residual)
    return True


class PaddingTeller:
    """Hook before the forward pass of MPT's blocks: gives their :class:`MoEFFN` the places of the real tokens.

    They are found once for all blocks, for which the host waits. A recomputation in backward finds them again.
    """

    def __init__(self) -> None:
        self._found: tuple[Tensor, Tensor | None] | None = None  # of the last mask

    def __call__(self, block: MPTBlock, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        block.ffn.real_T = self._places(options.get("attention_mask"), inputs[0].shape[1])

    def _places(self, mask_BL: Tensor | None, length: int) -> Tensor | None:
        if mask_BL is None:
            return None
        if self._found is None or self._found[0] is not mask_BL:
            real = mask_BL[:, -length:].flatten()  # with a cache, the mask also has the tokens in it
            self._found = mask_BL, None if bool(real.all()) else real.nonzero().flatten()
        return self._found[1]


class MoEMPTCausalLM(ComposerMPTCausalLM):
    """LLM Foundry's ``mpt_causal_lm``; if some FFNs are :class:`MoEFFN`, their losses are added and logged by name.

    Padding, which ``attention_mask`` tells, is neither routed nor counted by them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        teller = PaddingTeller()
        for block in self.modules():
            if isinstance(block, MPTBlock) and isinstance(block.ffn, MoEFFN):
                block.ffn.taken = True
                block.register_forward_pre_hook(teller, with_kwargs=True)

    def _moe_layers(self) -> list[MoEFFN]:
        return [module for module in self.modules() if isinstance(module, MoEFFN)]

    def loss(self, outputs: Any, batch: Any) -> Any:
        """Compute LLM Foundry's loss, plus the means over layers of the balance and z losses.

        Raises:
            RuntimeError: Reentrant checkpointing has cut the balance loss off from the weights.
        """
        lm = super().loss(outputs, batch)
        layers = self._moe_layers()
        taken = [layer.losses for layer in layers if layer.losses is not None]
        for layer in layers:
            layer.losses = None
        if not taken or not isinstance(lm, Tensor):
            return lm
        balance, z = (sum(losses, lm.new_zeros(())) / len(taken) for losses in zip(*taken, strict=True))
        if torch.is_grad_enabled() and not balance.requires_grad:
            raise RuntimeError(f"ffn_type {FFN_TYPE}: reentrant activation checkpointing loses the balance loss")
        return {"total": lm + balance + z, "loss": lm, "balance": balance, "z": z}

    @cached_property
    def n_active_params(self) -> int:
        """Parameters that one token uses, without experts that it does not choose."""
        idle = 0
        for layer in self._moe_layers():
            experts = sum(weight.numel() for weight in layer.moe.experts.parameters())
            idle += experts - experts * layer.cfg.top_k // layer.cfg.num_experts
        return int(super().n_active_params) - idle
