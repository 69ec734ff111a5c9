"""What FP8 does to the tensors of a model: accuracies of a recipe's products, and what is lost without each part of it.

The weights are put in a model of plain fp32; the operands of its products on some text are then rounded in every way
that is compared. Ratios are signal to noise (SQNR) in dB: 20 is an error of a tenth, 30 of a thirtieth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from moefoundry.config import PrecisionConfig
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.mixture import RowMixture
from moefoundry.ops.fp8 import (
    TILE,
    Format,
    Scaling,
    Tile,
    dequantize,
    dgrad,
    fprop,
    quantize,
    quantize_columns,
    retile,
    wgrad,
)
from moefoundry.ops.fp8.coarse import round_coarsely
from moefoundry.ops.fp8.gemm_reference import wgrad_reference
from moefoundry.ops.fp8.tensor_cores import TensorCores
from moefoundry.ops.grouped_linear import grouped_linear
from moefoundry.precision import AFTER_ATTENTION, apply_precision

TENSORS = ("x", "weight", "dY", "Y", "dX", "dW", "SwiGLU inputs", "o_proj input, E5M6")
FACTORS = [4**power for power in range(13)]
LONG = (4096, 8192)
ACCUMULATORS = {"promoted every 128": TensorCores(), "not promoted": TensorCores(promote_every=1 << 20)}


@dataclass
class Product:
    """Operands and results of one linear layer, or of one projection of all experts, in fp32.

    Attributes:
        x: [R, I].
        weight: [O, I], or [E, O, I]; its ``grad`` is dW.
        out: [R, O].
        sizes: int64 [E], rows of each expert.
        grad: [R, O], of ``out``.
    """

    x: Tensor
    weight: Tensor
    out: Tensor
    sizes: Tensor | None
    grad: Tensor

    def grad_x(self) -> Tensor:
        """[R, I]."""
        return self.grad @ self.weight if self.sizes is None else grouped_linear(self.grad, self.weight.mT, self.sizes)


def with_precision(model: MoETransformer, precision: PrecisionConfig) -> MoETransformer:
    """Another model with the same weights."""
    other = MoETransformer(model.cfg)
    apply_precision(other, precision)
    other.load_state_dict(model.state_dict())
    return other


def observe(model: MoETransformer, text_NS: Tensor) -> dict[str, Product]:
    """Every product that FP8 takes over, by the weight's name, in one forward and backward pass."""
    plain = with_precision(model, PrecisionConfig())
    names = {weight: name.removesuffix(".weight") for name, weight in plain.named_parameters()}
    products: dict[str, Product] = {}

    def watch(x: Tensor, weight: Tensor, out: Tensor, sizes: Tensor | None = None) -> Tensor:
        def keep(grad: Tensor) -> None:
            rows = (tensor.detach().flatten(0, -2) for tensor in (x, out, grad))
            products[names[weight]] = Product(next(rows), weight, next(rows), sizes, next(rows))

        out.register_hook(keep)
        return out

    for name, module in plain.named_modules():
        if isinstance(module, GroupedExperts):
            module.mixture = RowMixture(
                lambda x, weight, sizes: watch(x, weight, grouped_linear(x, weight, sizes), sizes)
            )
        elif type(module) is nn.Linear and not name.endswith("router.gate"):
            module.register_forward_hook(lambda module, inputs, out: watch(inputs[0], module.weight, out))
    plain(text_NS, text_NS).total.backward()
    return products


@torch.no_grad()
def accuracies(name: str, product: Product) -> dict[str, float]:
    """What ``deepseek_v3`` rounds, and the three results, against fp32 products of operands never rounded."""
    x, weight, sizes = product.x, product.weight, product.sizes
    rows, blocks, grads = quantize(x, Tile.ROW), quantize(weight, Tile.BLOCK), quantize(product.grad, Tile.ROW)
    kept = quantize(x, Tile.ROW, Format.E5M6) if name.endswith(AFTER_ATTENTION) else rows
    found = {
        "x": sqnr(x, dequantize(rows)),
        "weight": sqnr(weight, dequantize(blocks)),
        "dY": sqnr(product.grad, dequantize(grads)),
        "Y": sqnr(product.out, fprop(rows, blocks, sizes, torch.float32)),
        "dX": sqnr(product.grad_x(), dgrad(grads, blocks, sizes, torch.float32)),
        "dW": sqnr(weight.grad, wgrad(quantize_columns(product.grad, sizes), retile(kept, sizes))),
    }
    if kept is not rows:
        found["o_proj input, E5M6"] = sqnr(x, dequantize(kept))
    if name.endswith(("gate_proj", "up_proj")):
        found["SwiGLU inputs"] = sqnr(product.out, dequantize(quantize(product.out, Tile.ROW)))
    return found


def sqnr(exact: Tensor, rounded: Tensor) -> float:
    """dB, to the hundredth."""
    ratio = exact.double().square().sum() / (exact - rounded).double().square().sum()
    return round(10 * ratio.log10().item(), 2)


# --------------------------------------------------------------------------------------------------------- what breaks


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda x: round_coarsely(x, (0, 1)),
    "row": lambda x: round_coarsely(x, (1,)),
    "128x128": lambda x: dequantize(quantize(x, Tile.BLOCK)),
    "1x128": lambda x: dequantize(quantize(x, Tile.ROW)),
}


@torch.no_grad()
def breaks(products: dict[str, Product], length: int) -> dict[str, Any]:
    """What is lost where a part of the recipe is left out; ``length`` is that of sequences."""
    after_attention = products["layers.2.attention.o_proj"]
    middle = [product for name, product in products.items() if name.startswith("layers.2.")]
    x, grad = after_attention.x, after_attention.grad
    one_channel, one_token = torch.zeros_like(x, dtype=torch.bool), torch.zeros_like(grad, dtype=torch.bool)
    one_channel[:, 5], one_token[::TILE] = True, True
    return {
        "scales": {name: scale_losses([getattr(p, name) for p in products.values()]) for name in ("x", "grad")},
        "lost at ends": share_at_ends(products, length),
        "outliers": {
            "x: one channel raised": outliers(x, one_channel),
            "dY: every 128th token raised": outliers(grad, one_token),
        },
        "kept": {scaling: mean(wgrad_ratio(p, scaling, kept=True) for p in products.values()) for scaling in Scaling},
        "fresh": {scaling: mean(wgrad_ratio(p, scaling, kept=False) for p in products.values()) for scaling in Scaling},
        "sums": {name: mean(sums_ratio(p, cores) for p in middle) for name, cores in ACCUMULATORS.items()},
        "shortfall": {name: [shortfall(length, cores) for length in LONG] for name, cores in ACCUMULATORS.items()},
    }


def scale_losses(tensors: list[Tensor]) -> dict[str, list[float]]:
    """By scale, means over tensors: SQNR, percent of values flushed to zero, percent of rows whose SQNR is below 20."""
    losses = {}
    for way, rounded in SCALES.items():
        pairs = [(exact, rounded(exact)) for exact in tensors]
        flushed = [((exact != 0) & (got == 0)).double().mean().item() for exact, got in pairs]
        lost = [lost_rows(exact, got).double().mean().item() for exact, got in pairs]
        losses[way] = [mean(sqnr(*pair) for pair in pairs), 100 * mean(flushed), 100 * mean(lost)]
    return losses


def lost_rows(exact: Tensor, rounded: Tensor) -> Tensor:
    """bool [R]: SQNR below 20 dB."""
    return (exact - rounded).norm(dim=1) > 0.1 * exact.norm(dim=1)


def share_at_ends(products: dict[str, Product], length: int) -> float:
    """Percent of the rows of dY that blocks of 128x128 lose, in Linear layers, that are a sequence's first or last."""
    dense = [product.grad for product in products.values() if product.sizes is None]
    lost = torch.cat([lost_rows(grad, SCALES["128x128"](grad)).view(-1, length) for grad in dense])
    return 100 * (lost[:, [0, -1]].sum() / lost.sum()).item()


def outliers(x: Tensor, raised: Tensor) -> dict[str, list[float]]:
    """By scale, SQNR of the other values when those of ``raised`` are :data:`FACTORS` as large as they were."""
    inputs = [x.where(~raised, x * factor) for factor in FACTORS]
    return {way: [sqnr(x[~raised], rounded(each)[~raised]) for each in inputs] for way, rounded in SCALES.items()}


def wgrad_ratio(product: Product, scaling: Scaling, kept: bool) -> float:
    """SQNR of dW, of operands ``kept`` in FP8 rows and re-tiled, or fresh ones."""
    operands = [product.grad, product.x]
    if kept:
        operands = [dequantize(quantize(operand, Tile.ROW, scaling=scaling)) for operand in operands]
    grad, x = (quantize_columns(operand, product.sizes, scaling) for operand in operands)
    return sqnr(product.weight.grad, wgrad(grad, x))


def sums_ratio(product: Product, tensor_cores: TensorCores) -> float:
    """SQNR of dW on the model of tensor cores, against the same FP8 operands multiplied in fp32."""
    grad, x = (quantize_columns(operand, product.sizes) for operand in (product.grad, product.x))
    return sqnr(wgrad(grad, x), wgrad_reference(grad, x, torch.float32, tensor_cores))


def shortfall(length: int, tensor_cores: TensorCores) -> float:
    """Percent that sums of ``length`` products of one sign lose on the model of tensor cores."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, length, generator=generator).to(torch.float8_e4m3fn).float() for _ in range(2))
    return 100 * (1 - tensor_cores.multiply(a, b) / (a.double() @ b.double().T)).mean().item()
