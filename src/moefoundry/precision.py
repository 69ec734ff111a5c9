"""Precision as a transform of a built model.

Master weights, reduced gradients and optimizer state are fp32 (AdamW's moments by recipe). ``precision.compute`` sets
the dtype of the matrix products' operands. The router's gate, norms, softmax and the loss are always fp32.

    fp32            no change
    bf16            FSDP casts parameters and inputs to BF16, or one device multiplies by BF16 copies of the parameters
                    (``narrow_copies.py``); the gate stays fp32
    bf16_emulated   the operands of every Linear, of the experts and of the output head are rounded to BF16 and
                    multiplied in fp32: BF16's rounding on CPUs that multiply BF16 slowly or not at all. The embedding
                    and the inside of attention stay fp32.

``precision.fp8.recipe`` changes the products of every Linear and of the experts, except ``precision.fp8.exclude``;
adapters (``lora``) are computed beside them as ``precision.compute`` says:

    deepseek_v3     tiles and blocks, FP8 inputs kept for backward, FP8 dispatch (docs/fp8.md)
    rowwise         one scale for each row along K, nothing kept in FP8; for comparison, without kernels
    tensorwise      one scale for each tensor; otherwise as rowwise
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from moefoundry.adapters import AdaptedExperts, ExpertAdapter, LinearAdapter, Magnitude, has_adapter
from moefoundry.config import Compute, ConfigError, Fp8Config, Fp8Recipe, PrecisionConfig, UserError
from moefoundry.config.fp8_rules import exclude_problems
from moefoundry.model.indexer import Indexer
from moefoundry.model.linear_attention import Decay, GatedDeltaNet
from moefoundry.model.output_head import OutputHead
from moefoundry.moe.dispatch import Mix
from moefoundry.moe.experts import FeedForward, GroupedExperts, local_experts
from moefoundry.moe.mixture import RowMixture
from moefoundry.moe.router import Router
from moefoundry.ops.expert_bias import HiddenLayer
from moefoundry.ops.fp8 import (
    Backend,
    BlocksOfPass,
    Format,
    Granularity,
    KeptBlocks,
    coarse_linear,
    fp8_feed_forward,
    fp8_frozen_grouped_linear,
    fp8_kept_linear,
    fp8_linear,
    fp8_mixture,
)
from moefoundry.ops.fp8.backend import GEMM_CAPABILITY, describe_backend
from moefoundry.ops.fp8.wire import Fp8Codec
from moefoundry.ops.grouped_linear import GroupedLinear
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.rounding import round_gradient, round_operand

AFTER_ATTENTION = "o_proj"


def apply_precision(model: nn.Module, cfg: PrecisionConfig) -> None:
    """Change the products of ``model`` in place; parameters keep their names, dtypes and values.

    Raises:
        ConfigError: ``precision.fp8.exclude`` has patterns that no module matches.
    """
    if cfg.fp8.recipe is not None:
        _use_fp8(model, cfg.fp8)
    if cfg.compute == Compute.bf16_emulated:
        _emulate(model, torch.bfloat16)


def describe_fp8(cfg: Fp8Config, device: torch.device) -> str:
    """Describe the implementation of FP8 products on ``device``, with the reason if it is not the kernels.

    Raises:
        UserError: The backend that the recipe asks for cannot run there.
    """
    if cfg.recipe != Fp8Recipe.deepseek_v3:
        return f"{cfg.recipe}, rounded and multiplied in fp32"
    try:
        return f"{cfg.recipe} by {describe_backend(device, GEMM_CAPABILITY, _asked(cfg))}"
    except ValueError as error:
        raise UserError(f"precision.fp8.backend: {error}") from None


def mixed_precision(cfg: PrecisionConfig) -> MixedPrecisionPolicy:
    """Make FSDP's policy: the compute dtype, and reduction of gradients in fp32."""
    if cfg.compute == Compute.bf16:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def full_precision_modules(model: nn.Module, cfg: PrecisionConfig) -> list[nn.Module]:
    """List modules whose parameters must not be cast; each becomes an FSDP unit that stays fp32."""
    if cfg.compute != Compute.bf16:
        return []
    kinds = Router | Magnitude | Decay | Indexer
    held = [module for module in model.modules() if isinstance(module, kinds)]
    return [module for module in held if next(module.parameters(), None) is not None]  # a frozen indexer has buffers


class EmulatedLinear(nn.Linear):
    """``nn.Linear`` whose three products take operands rounded to ``operand_dtype``."""

    operand_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return _rounded_linear(input, self.weight, self.bias, dtype=self.operand_dtype)


class Fp8Module(nn.Module):
    """A module that quantizes its weights in blocks, in each pass or, with ``blocks``, once until these forget them."""

    blocks: KeptBlocks | None = None

    def keep_blocks(self, blocks: KeptBlocks) -> None:
        """Keep quantized weights in ``blocks`` from now on."""
        self.blocks = blocks


class Fp8Linear(Fp8Module, nn.Linear):
    """``nn.Linear`` in tiles and blocks of FP8; its input is kept for backward in the format ``kept``."""

    kept: Format
    backend: Backend | None

    def forward(self, input: Tensor) -> Tensor:
        out = fp8_linear(input, self.weight, self.kept, self.backend, self.blocks)
        return out if self.bias is None else out + self.bias


class Fp8FeedForward(Fp8Module, FeedForward):
    """A dense FFN that keeps its input and SwiGLU's inputs in FP8 for backward."""

    backend: Backend | None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        hidden = HiddenLayer(self.activation)
        return fp8_feed_forward(x, *weights, hidden=hidden, backend=self.backend, blocks=self.blocks)


class Fp8Experts(Fp8Module, GroupedExperts):
    """Experts that keep their input and SwiGLU's inputs in FP8 for backward."""

    fp8_backend: Backend | None

    def mix(self, tokens_PD: Tensor, weights_PK: Tensor, order: RowOrder) -> Tensor:
        weights, hidden = self.local_weights(), self.hidden_layer()
        return fp8_mixture(tokens_PD, weights_PK, *weights, order, hidden, self.fp8_backend, self.blocks)

    def in_chunks(self, links: Any, schedule: Callable[[Any, Mix], Any]) -> Any:
        if self.blocks is not None:
            return super().in_chunks(links, schedule)
        self.blocks = blocks = BlocksOfPass()
        try:
            return super().in_chunks(links, schedule)
        finally:
            blocks.forget()
            self.blocks = None


class Fp8AdaptedExperts(Fp8Module, AdaptedExperts):
    """Frozen experts whose products take FP8; adapters are beside them."""

    fp8_backend: Backend | None
    operand_dtype: torch.dtype | None = None

    def frozen_product(self, name: str, rows_NI: Tensor, counts_E: Tensor) -> Tensor:
        product: GroupedLinear = partial(
            fp8_frozen_grouped_linear, backend=self.fp8_backend, blocks=self.blocks, name=name
        )
        if self.operand_dtype is not None:
            product = _emulated(product, self.operand_dtype)
        return product(rows_NI, local_experts(getattr(self, name)), counts_E)


def codec_of_rows(experts: GroupedExperts) -> Fp8Codec | None:
    """Make the codec with which tokens of ``experts`` are sent; None sends them as they are."""
    return Fp8Codec(experts.fp8_backend) if isinstance(experts, Fp8Experts) else None


class CoarseLinear(nn.Linear):
    """``nn.Linear`` in FP8 with one scale for each tensor or row."""

    granularity: Granularity

    def forward(self, input: Tensor) -> Tensor:
        out = coarse_linear(input, self.weight, self.granularity)
        return out if self.bias is None else out + self.bias


def _use_fp8(model: nn.Module, cfg: Fp8Config) -> None:
    modules = _chosen(model, cfg.exclude)
    if cfg.recipe == Fp8Recipe.deepseek_v3:
        _use_tiles(modules, _asked(cfg))
    else:
        _use_coarse_scales(modules, Granularity(str(cfg.recipe)))


def _asked(cfg: Fp8Config) -> Backend | None:
    return None if cfg.backend is None else Backend(cfg.backend)


def _chosen(model: nn.Module, exclude: list[str]) -> dict[str, nn.Module]:
    """List the modules, by name, that no pattern excludes, directly or through a module around them."""
    modules = dict(model.named_modules())
    if problems := exclude_problems(exclude, modules):
        raise ConfigError(problems)

    def excluded(name: str) -> bool:
        parts = name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in exclude)

    wide = _gates(model) | _narrow(model)
    return {name: module for name, module in modules.items() if id(module) not in wide and not excluded(name)}


def _gates(model: nn.Module) -> set[int]:
    """Collect the ``id`` of every router's gate, whose product does not change."""
    return {id(module.gate) for module in model.modules() if isinstance(module, Router)}


def _narrow(model: nn.Module) -> set[int]:
    """Collect the ``id`` of the projections that give linear attention a number for each head, never in FP8."""
    layers = [module for module in model.modules() if isinstance(module, GatedDeltaNet)]
    return {id(projection) for layer in layers for projection in (layer.beta_proj, layer.decay_proj)}


def _use_tiles(modules: dict[str, nn.Module], backend: Backend | None) -> None:
    for name, module in modules.items():
        whole = all(f"{name}.{child}" in modules for child, _ in module.named_children())
        if type(module) is GroupedExperts:
            module.__class__ = Fp8Experts
            cast(Fp8Experts, module).fp8_backend = backend
        elif type(module) is AdaptedExperts:
            module.__class__ = Fp8AdaptedExperts
            cast(Fp8AdaptedExperts, module).fp8_backend = backend
        elif type(module) is FeedForward and whole and not has_adapter(module):
            module.__class__ = Fp8FeedForward
            cast(Fp8FeedForward, module).backend = backend
        elif isinstance(module, Router):
            module.product = partial(fp8_kept_linear, backend=backend)
        elif type(module) is nn.Linear:
            module.__class__ = Fp8Linear
            linear = cast(Fp8Linear, module)
            linear.kept = Format.E5M6 if name.endswith(f".{AFTER_ATTENTION}") else Format.E4M3
            linear.backend = backend


def _use_coarse_scales(modules: dict[str, nn.Module], granularity: Granularity) -> None:
    for module in modules.values():
        if isinstance(module, GroupedExperts):
            module.mixture = RowMixture(lambda rows, weight, sizes: coarse_linear(rows, weight, granularity, sizes))
        elif type(module) is nn.Linear:
            module.__class__ = CoarseLinear
            cast(CoarseLinear, module).granularity = granularity


def _emulate(model: nn.Module, dtype: torch.dtype) -> None:
    gates = _gates(model)
    for module in model.modules():
        if isinstance(module, Fp8AdaptedExperts):
            module.operand_dtype = dtype
        elif isinstance(module, GroupedExperts):
            module.mixture = RowMixture(_emulated(module.product, dtype))
        elif isinstance(module, ExpertAdapter):
            module.product = _emulated(module.product, dtype)
        elif isinstance(module, LinearAdapter):
            module.product = partial(_rounded_linear, dtype=dtype)
        elif isinstance(module, OutputHead):
            module.operand_dtype = dtype
        elif type(module) is nn.Linear and id(module) not in gates:
            module.__class__ = EmulatedLinear
            cast(EmulatedLinear, module).operand_dtype = dtype


def _rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    return round_gradient(F.linear(round_operand(x, dtype), round_operand(weight, dtype), bias), dtype)


def _emulated(grouped_linear: GroupedLinear, dtype: torch.dtype) -> GroupedLinear:
    def rounded(rows_RI: Tensor, weight_EOI: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        out = grouped_linear(round_operand(rows_RI, dtype), round_operand(weight_EOI, dtype), tokens_per_expert_E)
        return round_gradient(out, dtype)

    return rounded
