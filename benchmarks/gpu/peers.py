"""The same MoE layer by others, with the same weights and tokens, and a router with random weights.

Two kinds are compared, each among themselves; ``router`` says which a part is, in the table too.

- with a router: moefoundry's layer, which also computes and back-propagates its balance loss and z-loss, and the blocks
  of transformers, which have no such losses here;
- without one, given experts and their weights: moefoundry's experts, plain torch, Liger and QuACK. Sorting by expert
  counts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.figures import Figures, NotRunError, Part
from benchmarks.gpu.layer import (
    DEEPSEEK_V3,
    SAMPLES,
    SHAPES,
    TINY,
    TOLERANCE,
    Case,
    Shape,
    available_backends,
    build,
    error,
    forward,
    kernels_chosen,
    mixture,
    speed,
    with_fused,
)
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import peak_bytes
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.permute import order_by_expert, permute, permute_slots, sum_rows


class Weights(NamedTuple):
    """What every peer is given.

    Attributes:
        gate_up_E2FD, down_EDF: Of the experts; gate above up.
        router_ED: fp32.
        x_BSD, grad_BSD: Tokens, and the gradient of the output.
        ids_TK, topk_TK: Chosen experts and their weights.
    """

    gate_up_E2FD: Tensor
    down_EDF: Tensor
    router_ED: Tensor
    x_BSD: Tensor
    grad_BSD: Tensor
    ids_TK: Tensor
    topk_TK: Tensor


class Peer(NamedTuple):
    """A contender.

    Attributes:
        layer: Holds the parameters.
        call: Input [B, S, D] to output of the same shape.
        routed: Experts and weights that it uses.
        router: It chooses them by itself.
    """

    layer: nn.Module
    call: Callable[[Tensor], Tensor]
    routed: tuple[Tensor, Tensor]
    router: bool = False


class Ours(NamedTuple):
    """A contender of moefoundry.

    Attributes:
        backend: Of ``model.moe.backend``.
        fused: With ``fused_kernels: true``.
        router: The whole layer; otherwise its experts, which are given.
    """

    backend: str
    fused: bool = False
    router: bool = True

    def __str__(self) -> str:
        return f"moefoundry {self.kind}{'' if self.router else ', experts given'}"

    @property
    def kind(self) -> str:
        """Whose kernels run."""
        return self.backend + with_fused(self.fused)


def preload() -> None:
    """Import before the time counts; what cannot be imported is said when it is needed."""
    for module in ("transformers.models.olmoe.modeling_olmoe", "liger_kernel.ops.fused_moe"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def run(figures: Figures, options: Options) -> None:
    """Every peer at every shape, between moefoundry's backends, for the same minutes."""
    shapes = TINY if options.device == "cpu" else (*SHAPES[:1], DEEPSEEK_V3, *SHAPES[1:3])
    for shape in shapes:
        for own in OURS:
            figures.run(f"{shape}, {own}", ours, shape, own, options, kind=own.kind)
        for name, peer in PEERS.items():
            figures.run(f"{shape}, {name}", measure, peer, shape, options, kind=name)
        for backend in available_backends():
            own = Ours(backend)
            figures.run(f"{shape}, {own}", ours, shape, own, options, kind=own.kind)
    for shape in shapes:
        figures.run(f"{shape}, {TUNED}", measure, quack, shape, options, kind=TUNED)


def precision_of(options: Options) -> str:
    return "fp32" if options.device == "cpu" else "bf16"


def ours(part: Part, shape: Shape, own: Ours, options: Options) -> None:
    """moefoundry's layer, losses of the router included, or its experts alone."""
    with kernels_chosen(own.fused):
        layer, x_BSD, grad_BSD = build(Case(shape, own.backend, "real", precision_of(options)), options)
        call = partial(forward, layer) if own.router else experts_alone(layer, x_BSD)
        part.put(router=own.router)
        part.put(**speed(call, copies_of(x_BSD), grad_BSD, layer, shape, options))


def experts_alone(layer: MoELayer, x_BSD: Tensor) -> Callable[[Tensor], tuple[Tensor, None]]:
    """The layer without its router: what the peers compute that are given experts and weights."""
    with torch.no_grad():
        routing = layer.router(x_BSD.flatten(0, 1))
    layer.topk = nn.Parameter(routing.topk_weights)

    def call(x_BSD: Tensor) -> tuple[Tensor, None]:
        order = order_by_expert(routing.topk_expert_ids, len(layer.experts.down_proj))
        return layer.experts(x_BSD.flatten(0, 1), layer.topk, order).view_as(x_BSD), None

    return call


def measure(part: Part, make: Callable[[Weights], Peer], shape: Shape, options: Options) -> None:
    """Check a peer's output at some tokens, then time it."""
    weights = weights_of(shape, options)
    peer = make(weights)
    part.put(router=peer.router, **check(peer, weights, options))
    inputs = copies_of(weights.x_BSD)
    part.put(**speed(lambda x: (peer.call(x), None), inputs, weights.grad_BSD, peer.layer, shape, options))
    if options.device == "cuda":
        part.put(peak_bytes=peak_bytes(lambda: peer.call(inputs[0]).backward(weights.grad_BSD), options.device))


def copies_of(x: Tensor) -> list[Tensor]:
    """Two inputs with the same values."""
    return [x.detach().clone().requires_grad_() for _ in range(2)]


def weights_of(shape: Shape, options: Options) -> Weights:
    """Those of moefoundry's layer."""
    layer, x_BSD, grad_BSD = build(Case(shape, "grouped_mm", "real", precision_of(options)), options)
    with torch.no_grad():
        routing = layer.router(x_BSD.flatten(0, 1))
    experts = layer.experts
    gate_up = torch.cat([experts.gate_proj.detach(), experts.up_proj.detach()], dim=1)
    router = layer.router.gate.weight.detach()
    return Weights(
        gate_up, experts.down_proj.detach(), router, x_BSD, grad_BSD, routing.topk_expert_ids, routing.topk_weights
    )


def check(peer: Peer, weights: Weights, options: Options) -> dict[str, Any]:
    """Relative error of the output at some tokens, against float64."""
    with torch.no_grad():
        out = peer.call(weights.x_BSD).flatten(0, 1)
    ids, topk = peer.routed
    picked = torch.randperm(len(ids), device=ids.device)[:SAMPLES]
    gate, up = weights.gate_up_E2FD.chunk(2, dim=1)
    x = weights.x_BSD.detach().flatten(0, 1)[picked].double()
    expected = mixture(x, [gate, up, weights.down_EDF], ids[picked], topk[picked].double())
    found = error(out[picked], expected)
    limit = TOLERANCE[precision_of(options)]
    return {"output_error": found} | ({"wrong": f"over {limit}"} if not found <= limit else {})


class Parameters(nn.Module):
    """The experts' weights as parameters."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(weights.gate_up_E2FD)
        self.down = nn.Parameter(weights.down_EDF)
        self.topk = nn.Parameter(weights.topk_TK.to(weights.x_BSD.dtype))


def bare(weights: Weights, function: Callable[..., Tensor], ids_TK: Tensor) -> Peer:
    """A function of tokens, weights and chosen experts as a peer."""
    own = Parameters(weights)

    def call(x_BSD: Tensor) -> Tensor:
        return function(x_BSD.flatten(0, 1), own.gate_up, own.down, ids_TK, own.topk).view_as(x_BSD)

    return Peer(own, call, (weights.ids_TK, own.topk.detach()))


def plain_grouped_mm(weights: Weights) -> Peer:
    """The best that users of torch alone write: see :func:`grouped_mm_mixture`."""
    return bare(weights, grouped_mm_mixture, weights.ids_TK)


def grouped_mm_mixture(x_TD: Tensor, gate_up: Tensor, down: Tensor, ids_TK: Tensor, topk_TK: Tensor) -> Tensor:
    """Sort, gather, two grouped products with gate and up in one, sum: [T, D] -> [T, D].

    All by torch's operators, one after the other, not compiled. Rows are gathered and summed by the functions of
    ``moefoundry.ops.permute``: ``index_select`` and ``embedding_bag``, each the other's backward pass. Autograd's own
    for ``index_select`` would be atomic additions in BF16. Transformers' blocks leave it to autograd.
    """
    order = order_by_expert(ids_TK, len(down))
    ends_E = order.tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    gate_NF, up_NF = F.grouped_mm(permute(x_TD, order), gate_up.mT, offs=ends_E).chunk(2, dim=1)
    hidden_NF = F.silu(gate_NF) * up_NF * permute_slots(topk_TK, order).unsqueeze(1)
    return sum_rows(F.grouped_mm(hidden_NF, down.mT, offs=ends_E), order)


def liger(weights: Weights) -> Peer:
    """Liger's fused MoE."""
    require("liger-kernel", "liger_kernel.ops.fused_moe")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    if not weights.x_BSD.is_cuda:
        raise NotRunError("Liger's kernels need a GPU")
    return bare(weights, LigerFusedMoEFunction.apply, weights.ids_TK.int())


def quack(weights: Weights) -> Peer:
    """QuACK's GEMMs, forward: gathered gate and up with SwiGLU, down, and a weighted sum in torch."""
    require("quack-kernels", "quack.gemm_interface")
    from quack.gemm_interface import gemm, gemm_gated

    if not weights.x_BSD.is_cuda:
        raise NotRunError("QuACK's kernels need a GPU")

    def function(x_TD: Tensor, gate_up: Tensor, down: Tensor, ids_TK: Tensor, topk_TK: Tensor) -> Tensor:
        sorted_N, order_N = ids_TK.flatten().sort(stable=True)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        bounds = torch.arange(len(down) + 1, device=order_N.device)
        starts_E1 = torch.searchsorted(sorted_N, bounds).int()
        token_N = (order_N // ids_TK.shape[1]).int()
        _, hidden_NF = gemm_gated(
            x_TD,
            gate_up.mT,
            activation="swiglu",
            cu_seqlens_m=starts_E1,
            A_idx=token_N,
            concat_layout=("B",),
        )
        out_ND = gemm(hidden_NF, down.mT, cu_seqlens_m=starts_E1)
        return (out_ND.index_select(0, place_N).view(*ids_TK.shape, -1) * topk_TK.unsqueeze(-1)).sum(1)

    return bare(weights, function, weights.ids_TK)


def olmoe(weights: Weights) -> Peer:
    """transformers' OLMoE block."""
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    return transformers_block(weights, OlmoeConfig, OlmoeSparseMoeBlock, "intermediate_size")


def qwen3_moe(weights: Weights) -> Peer:
    """transformers' Qwen3-MoE block."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    return transformers_block(weights, Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, "moe_intermediate_size")


def transformers_block(weights: Weights, config: Any, block: Any, hidden_size: str) -> Peer:
    """A sparse block whose experts multiply by ``grouped_mm``."""
    version = importlib.metadata.version("transformers")
    if int(version.split(".")[0]) < 5:
        raise NotRunError(f"transformers {version} multiplies one expert at a time; 5 and later have grouped_mm")
    experts, width, hidden = weights.down_EDF.shape
    sizes = {"num_experts": experts, "num_experts_per_tok": weights.ids_TK.shape[1], "norm_topk_prob": True}
    cfg = config(hidden_size=width, **{hidden_size: hidden}, **sizes)
    cfg._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        layer = block(cfg)
    own = {
        "gate.weight": weights.router_ED.to(weights.x_BSD.dtype),
        "experts.gate_up_proj": weights.gate_up_E2FD,
        "experts.down_proj": weights.down_EDF,
    }
    layer.load_state_dict(own, assign=True)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    with torch.no_grad():
        _, topk_TK, ids_TK = layer.gate(weights.x_BSD.flatten(0, 1))
    return Peer(layer, layer, (ids_TK, topk_TK), router=True)


def require(package: str, module: str) -> None:
    """Import a peer's module, or say why not."""
    try:
        importlib.import_module(module)
    except Exception as error:
        raise NotRunError(f"{package} cannot be imported: {type(error).__name__}: {error}"[:300]) from None


OURS = (
    Ours("grouped_mm"),
    Ours("grouped_mm", fused=True),
    Ours("triton", fused=True),
    Ours("triton", fused=True, router=False),
)
"""Before the peers; every backend without fused kernels comes after them."""
PEERS: dict[str, Callable[[Weights], Peer]] = {
    "torch, grouped_mm between gathers": plain_grouped_mm,
    "transformers OLMoE": olmoe,
    "transformers Qwen3-MoE": qwen3_moe,
    "Liger": liger,
}
TUNED = "QuACK, forward"
"""Comes last: it compiles and times many kernels before its first product."""
