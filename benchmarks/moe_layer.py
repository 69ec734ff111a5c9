"""Forward and backward of one MoE layer: moefoundry against LLM Foundry's and transformers' layers and a dense ceiling.

All layers get the same weights, input and output gradient, and are first shown to compute the same output and the same
gradients (of the input and of every weight). They run in one process: same threads, allocator, dtype (fp32). Each does
what it does in training by default. moefoundry's layer therefore also computes its balance loss, z-loss and load
statistics and back-propagates the losses; the others do not (``torch_dmoe`` has no balance loss, transformers computes
its own outside of the block and only on request).

The ceiling is the time of a dense FFN's matrix products, and nothing else, with exactly the layer's expert FLOPs: the
three SwiGLU products of N = T * K rows forward, and the two gradients of each, 18 * N * D * F in nine GEMMs of shapes
[N,D]x[D,F], [N,F]x[F,D], [F,N]x[N,D] and [D,N]x[N,F], written into buffers that exist already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Comparison, in_turn
from moefoundry.config import MoEConfig
from moefoundry.moe.layer import MoELayer

SEQUENCE = 512
CEILING = "nine dense GEMMs"
LLM_FOUNDRY = "LLM Foundry dMoE"
OLMOE = "transformers OLMoE"
MIXTRAL = "transformers Mixtral"


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, and what its ratio to each peer has to reach."""

    tokens: int
    d_model: int
    hidden: int
    experts: int
    top_k: int
    targets: tuple[tuple[str, float], ...] = ((OLMOE, 1.0), (MIXTRAL, 1.0))

    def __str__(self) -> str:
        return f"T {self.tokens}, D {self.d_model}, F {self.hidden}, E {self.experts}, K {self.top_k}"


SHAPES = [
    Shape(4096, 256, 128, 64, 8, ((LLM_FOUNDRY, 1.7), (OLMOE, 1.0), (MIXTRAL, 1.0))),
    Shape(2048, 512, 256, 64, 8, ((LLM_FOUNDRY, 6.0), (OLMOE, 1.0), (MIXTRAL, 1.0))),
    Shape(4096, 256, 512, 8, 2, ((CEILING, 0.7), (OLMOE, 1.0), (MIXTRAL, 1.0))),
    Shape(2048, 256, 128, 128, 8),
]
QUICK_SHAPES = [Shape(512, 64, 32, 8, 2), Shape(512, 64, 32, 64, 8)]


def compare(rounds: int = 11, warmup: int = 2, quick: bool = False, device: str = "cpu") -> list[Comparison]:
    """Measure every shape."""
    comparisons: list[Comparison] = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        comparisons += compare_shape(shape, rounds=3 if quick else rounds, warmup=1 if quick else warmup, device=device)
    return comparisons


def compare_shape(shape: Shape, rounds: int, warmup: int, device: str) -> list[Comparison]:
    """Check that the layers agree, then time ours in turn with each of the others.

    Two at a time: what a third leaves in the allocator and the caches would be charged to its neighbours.
    """
    torch.manual_seed(0)
    with torch.device(device):
        ours = build_moefoundry(shape)
        layers: dict[str, nn.Module] = {
            "moefoundry": ours,
            LLM_FOUNDRY: build_llm_foundry(shape, ours),
            OLMOE: build_olmoe(shape, ours),
            MIXTRAL: build_mixtral(shape, ours),
        }
        x = torch.randn(shape.tokens // SEQUENCE, SEQUENCE, shape.d_model)
        grad = torch.randn_like(x)
        check_equal(layers, x, grad)
        contenders = {name: training_step(layer, x, grad) for name, layer in layers.items()}
        contenders[CEILING] = dense_ceiling(shape)
    contenders = {name: synchronized(run, device) for name, run in contenders.items()}
    mine, targets = contenders.pop("moefoundry"), dict(shape.targets)
    comparisons = []
    for peer, run in contenders.items():
        seconds = in_turn({"moefoundry": mine, peer: run}, rounds, warmup)
        ours_ms, theirs_ms = ([1e3 * value for value in values] for values in seconds.values())
        comparisons.append(Comparison("MoE layer", str(shape), "ms", peer, ours_ms, theirs_ms, targets.get(peer)))
    return comparisons


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward, gradients of the input and of all weights made anew."""
    x = x.clone().requires_grad_()

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        output = layer(x)
        if isinstance(layer, MoELayer):
            balance = layer_losses(layer, output)
            torch.autograd.backward([output[0], balance], [grad, None])
        else:
            first(output).backward(grad)

    return step


def layer_losses(layer: MoELayer, output: tuple[Tensor, object]) -> Tensor:
    """What moefoundry adds to the loss for this layer, with the recipe's default weights."""
    stats, weights = output[1], MoEConfig().balance
    return weights.aux_loss_weight * stats.balance_loss + weights.z_loss_weight * stats.z_loss  # type: ignore[attr-defined]


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The layer's output proper."""
    return output if isinstance(output, Tensor) else output[0]


def synchronized(run: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU, wait for the work that ``run`` queued."""
    if device == "cpu":
        return run

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait


def dense_ceiling(shape: Shape) -> Callable[[], object]:
    """The nine products of a dense SwiGLU over N rows, without anything between them."""
    rows, width, hidden = shape.tokens * shape.top_k, shape.d_model, shape.hidden
    x_ND, h_NF = torch.randn(rows, width), torch.randn(rows, hidden)
    up_FD, down_DF = torch.randn(hidden, width), torch.randn(width, hidden)
    out_ND, out_NF = torch.empty_like(x_ND), torch.empty_like(h_NF)
    out_FD, out_DF = torch.empty_like(up_FD), torch.empty_like(down_DF)

    def products() -> None:
        for _ in ("gate", "up"):
            torch.mm(x_ND, up_FD.T, out=out_NF)
            torch.mm(h_NF, up_FD, out=out_ND)
            torch.mm(h_NF.T, x_ND, out=out_FD)
        torch.mm(h_NF, down_DF.T, out=out_ND)
        torch.mm(x_ND, down_DF, out=out_NF)
        torch.mm(x_ND.T, h_NF, out=out_DF)

    return products


# --------------------------------------------------------------------------------------------------------- the layers


def build_moefoundry(shape: Shape) -> MoELayer:
    """moefoundry's layer with random weights."""
    cfg = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, expert_hidden_size=shape.hidden, num_shared_experts=0)
    layer = MoELayer(shape.d_model, cfg)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


@torch.no_grad()
def build_llm_foundry(shape: Shape, ours: MoELayer) -> nn.Module:
    """LLM Foundry's ``torch_dmoe`` as a SwiGLU (``glu`` with SiLU, top-k weights that sum to 1)."""
    from llmfoundry.models.layers.dmoe import dMoE

    layer = dMoE(
        device=None,
        hidden_size=shape.d_model,
        ffn_hidden_size=shape.hidden,
        moe_num_experts=shape.experts,
        moe_top_k=shape.top_k,
        mlp_type="glu",
        activation_fn=F.silu,
        moe_normalize_expert_weights=1,
        bias=False,
    )
    experts = layer.experts.mlp
    layer.router.layer.weight.copy_(ours.router.gate.weight)
    experts.w1.copy_(ours.experts.gate_proj.flatten(0, 1))
    experts.v1.copy_(ours.experts.up_proj.flatten(0, 1))
    experts.w2.copy_(ours.experts.down_proj.transpose(1, 2).flatten(0, 1))
    return layer


def build_olmoe(shape: Shape, ours: MoELayer) -> nn.Module:
    """transformers' OLMoE block."""
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    return copy_experts(OlmoeSparseMoeBlock(config), ours, names=("gate_proj", "up_proj", "down_proj"))


def build_mixtral(shape: Shape, ours: MoELayer) -> nn.Module:
    """transformers' Mixtral block."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    return copy_experts(MixtralSparseMoeBlock(config), ours, names=("w1", "w3", "w2"))


@torch.no_grad()
def copy_experts(block: Any, ours: MoELayer, names: tuple[str, str, str]) -> nn.Module:
    """Copy the gate and every expert into a block that holds its experts as a list of modules."""
    block.gate.weight.copy_(ours.router.gate.weight)
    stacks = (ours.experts.gate_proj, ours.experts.up_proj, ours.experts.down_proj)
    for name, stack in zip(names, stacks, strict=True):
        for expert, weight in zip(block.experts, stack, strict=True):
            getattr(expert, name).weight.copy_(weight)
    return block


# ------------------------------------------------------------------------------------------- do they compute alike


def check_equal(layers: dict[str, nn.Module], x: Tensor, grad: Tensor) -> None:
    """Every layer gives moefoundry's output, and its gradients of the input, the gate and the experts.

    Raises:
        AssertionError: One does not.
    """
    expected: dict[str, Tensor] = {}
    for name, layer in layers.items():
        got = results(layer, x, grad)
        for what, value in got.items():
            scale = expected.setdefault(what, value).abs().max()
            error = ((value - expected[what]).abs().max() / scale).item()
            assert error < 1e-4, f"{name}: {what} differs from moefoundry's by {error:.1e} of its largest value"


def results(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a layer by moefoundry's names and in its layouts."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    output = first(layer(x))
    output.backward(grad)
    assert x.grad is not None
    found = {"output": output.detach(), "gradient of the input": x.grad}
    return found | {f"gradient of {name}": value for name, value in weight_gradients(layer, x.shape[-1]).items()}


def weight_gradients(layer: nn.Module, d_model: int) -> dict[str, Tensor]:
    """Gradients of the gate and of the stacked experts."""
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    if isinstance(layer, MoELayer):
        return {name.split(".", 1)[1].removesuffix(".weight"): value for name, value in gradients.items()}
    if "router.layer.weight" in gradients:
        experts = gradients["router.layer.weight"].shape[0]
        gate, up, down = (gradients[f"experts.mlp.{name}"].view(experts, -1, d_model) for name in ("w1", "v1", "w2"))
        router = gradients["router.layer.weight"]
        return {"gate": router, "gate_proj": gate, "up_proj": up, "down_proj": down.transpose(1, 2)}
    experts = gradients["gate.weight"].shape[0]
    names = ("gate_proj", "up_proj", "down_proj") if "experts.0.gate_proj.weight" in gradients else ("w1", "w3", "w2")
    stacks = [torch.stack([gradients[f"experts.{e}.{name}.weight"] for e in range(experts)]) for name in names]
    return {"gate": gradients["gate.weight"], "gate_proj": stacks[0], "up_proj": stacks[1], "down_proj": stacks[2]}
