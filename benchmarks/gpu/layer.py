"""The MoE layer, forward and backward, for every backend that runs: right first, then how fast.

Letters: T tokens, D width, F hidden width of an expert, E experts, K experts a token, B sequences of S tokens.
A forward pass is 6 T D F K operations and a backward pass twice as many, whatever else a layer does. As in training,
the layer computes and back-propagates its balance loss and z-loss too.

A check that fails leaves ``wrong`` in the part's figures; the times are there all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.figures import Figures, NotRunError, Part
from benchmarks.gpu.routers import ROUTERS, expert_ids
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import host_syncs, largest_kernels, peak_bytes, tflops, timed
from moefoundry.config import Fp8Backend, Fp8Config, Fp8Recipe, MoEConfig, PrecisionConfig
from moefoundry.config.parts import TABLES
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.kernel_choice import fused_kernels, use_fused_kernels
from moefoundry.precision import apply_precision

SEQUENCE = 4096
SAMPLES = 48
"""Tokens that are computed again in float64."""
TOLERANCE = {"bf16": 1e-2, "fp8": 1e-1, "fp8 by DeepGEMM": 1e-1, "fp32": 1e-5}
"""Of the norm of the error over the norm of the values."""


class Shape(NamedTuple):
    """Sizes of a layer."""

    T: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"T{self.T} D{self.D} F{self.F} E{self.E} K{self.K}"

    @property
    def operations(self) -> int:
        """Of a forward pass."""
        return 6 * self.T * self.D * self.F * self.K


ANCHORS = (
    Shape(24576, 1536, 256, 128, 8),
    Shape(32768, 4096, 512, 128, 8),
    Shape(32768, 4096, 1024, 128, 8),
)
"""What MoE kernels are published at."""
DEEPSEEK_V3 = Shape(2048, 7168, 2048, 32, 8)
"""32 of 256 experts with an eighth of 16384 tokens: an expert has the 512 rows that it has in the whole layer."""
SHAPES = (*ANCHORS, DEEPSEEK_V3)
TINY = (Shape(256, 64, 32, 8, 2),)


class Case(NamedTuple):
    """One layer to measure.

    Attributes:
        backend: Of ``model.moe.backend``.
        router: Of :data:`~benchmarks.gpu.routers.ROUTERS`.
        precision: One of :data:`TOLERANCE`; ``fp32`` on a CPU.
        fused: With ``fused_kernels: true``.
    """

    shape: Shape
    backend: str
    router: str
    precision: str
    fused: bool = False

    def __str__(self) -> str:
        return f"{self.shape}, {self.router} router, {self.backend}, {self.precision}{with_fused(self.fused)}"

    @property
    def kind(self) -> str:
        """Whose kernels run."""
        return self.backend + with_fused(self.fused)


def with_fused(fused: bool) -> str:
    """Complete the name of what is measured."""
    return ", fused kernels" if fused else ""


def run(figures: Figures, options: Options) -> None:
    """Every shape, router and backend; the oracle at one shape only."""
    shapes, precision = (TINY, "fp32") if options.device == "cpu" else (SHAPES, "bf16")
    cases = []
    for shape in shapes:
        cases += [Case(shape, backend, router, precision) for router in ROUTERS for backend in available_backends()]
        cases.append(Case(shape, "triton", "real", precision, fused=True))
    for case in (*cases, Case(shapes[0], "loop", ROUTERS[0], precision)):
        figures.run(str(case), measure, case, options, kind=case.kind)


def available_backends() -> list[str]:
    """Backends that a recipe may name, torch's own first; not the oracle, nor ``auto``, which is one of the others."""
    names = [name for name in TABLES["mixture_backends"].names() if name not in ("loop", "auto")]
    return sorted(names, key=lambda name: name != "grouped_mm")


def measure(part: Part, case: Case, options: Options) -> None:
    """Check a layer against float64, then time it, with the kernels that the case has."""
    with kernels_chosen(case.fused):
        measure_layer(part, case, options)


@contextmanager
def kernels_chosen(fused: bool) -> Iterator[None]:
    """Choose ``fused_kernels`` in here."""
    before = fused_kernels()
    use_fused_kernels(fused)
    try:
        yield
    finally:
        use_fused_kernels(before)


def measure_layer(part: Part, case: Case, options: Options) -> None:
    """Check a layer against float64, then time it."""
    layer, x_BSD, grad_BSD = build(case, options)
    ids_TK = None if case.router == "real" else expert_ids(case.router, case.shape, options.device)
    if ids_TK is not None:
        choose(layer, ids_TK)
    part.put(**check(layer, x_BSD, grad_BSD, ids_TK, case))
    part.put(**memory(layer, x_BSD, grad_BSD, options))
    inputs = [x_BSD, x_BSD.detach().clone()]
    part.put(**speed(partial(forward, layer), inputs, grad_BSD, layer, case.shape, options))

    def both() -> None:
        both_passes(layer, x_BSD, grad_BSD)

    part.put(syncs=host_syncs(both, options.device))
    part.put(kernels_us=largest_kernels(both, options.device, 25))


def build(case: Case, options: Options) -> tuple[MoELayer, Tensor, Tensor]:
    """A layer with random weights, tokens and their gradients; the router stays fp32."""
    shape = case.shape
    torch.manual_seed(0)
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    with torch.device(options.device):
        cfg = MoEConfig(
            num_experts=shape.E,
            top_k=shape.K,
            expert_hidden_size=shape.F,
            num_shared_experts=0,
            backend=case.backend,
        )
        layer = MoELayer(shape.D, cfg)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        layer.experts.to(dtype)
        sequences = max(1, shape.T // SEQUENCE)
        x_BSD, grad_BSD = (torch.randn(sequences, shape.T // sequences, shape.D, dtype=dtype) for _ in range(2))
    if case.precision.startswith("fp8"):
        backend = Fp8Backend.deepgemm if case.precision.endswith("DeepGEMM") else None
        apply_precision(layer, PrecisionConfig(fp8=Fp8Config(Fp8Recipe.deepseek_v3, backend=backend)))
    refuse_what_cannot_run(layer, x_BSD)
    return layer.train(), x_BSD.requires_grad_(), grad_BSD


def refuse_what_cannot_run(layer: MoELayer, x_BSD: Tensor) -> None:
    """Say why, where the layer's backend does not take these tokens or this device."""
    try:
        layer(x_BSD)  # all of them: kernels are tuned in their first call
    except ValueError as error:
        raise NotRunError(str(error)) from None


def choose(layer: MoELayer, ids_TK: Tensor) -> None:
    """Let the router choose these experts; it still scores, weighs and has its gradients."""
    layer.router._choose = lambda scores_TE: ids_TK


def forward(layer: MoELayer, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the losses of the layer with the weights that recipes give them."""
    out_BSD, stats = layer(x_BSD)
    return out_BSD, 1e-2 * stats.balance_loss + 1e-3 * stats.z_loss


def both_passes(layer: nn.Module, x: Tensor, grad: Tensor, call: Callable[..., Any] = forward) -> None:
    """Forward and backward of a layer, with the gradients of its input and of every weight."""
    layer.zero_grad(set_to_none=True)
    out, loss = call(layer, unseen(x))
    torch.autograd.backward([out, loss], [grad.detach(), None])


def unseen(x: Tensor) -> Tensor:
    """The same values as a new tensor: what FP8 layers keep of a tensor that they have quantized is not there."""
    return x.detach().requires_grad_()


def speed(
    call: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    inputs: list[Tensor],
    grad: Tensor,
    layer: nn.Module,
    shape: Shape,
    options: Options,
) -> dict[str, Any]:
    """Times and TFLOP/s of calls with these inputs in turn, which give an output and a loss."""

    def both(x: Tensor) -> None:
        layer.zero_grad(set_to_none=True)
        out, loss = call(unseen(x))
        grads = [grad.detach()]
        torch.autograd.backward([out] if loss is None else [out, loss], grads if loss is None else [*grads, None])

    ahead = timed([lambda x=x: call(unseen(x)) for x in inputs], options.device)
    whole = timed([lambda x=x: both(x) for x in inputs], options.device)
    backward_ms = max(whole["ms"] - ahead["ms"], 1e-6)
    return {
        "tflops_forward": tflops(shape.operations, ahead["ms"]),
        "tflops_backward": tflops(2 * shape.operations, backward_ms),
        "tflops_both": tflops(3 * shape.operations, whole["ms"]),
        "backward_ms": round(backward_ms, 4),
        "forward": ahead,
        "both": whole,
    }


def memory(layer: MoELayer, x_BSD: Tensor, grad_BSD: Tensor, options: Options) -> dict[str, int | None]:
    """Bytes kept for backward, without the output; and at the peak of both passes, with weights and gradients."""
    if options.device != "cuda":
        return {}
    layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    kept = forward(layer, unseen(x_BSD))
    torch.cuda.synchronize()
    kept_bytes = torch.cuda.memory_allocated() - before - kept[0].nbytes
    del kept
    peak = peak_bytes(lambda: both_passes(layer, x_BSD, grad_BSD), options.device)
    return {"kept_bytes": kept_bytes, "peak_bytes": peak}


def check(layer: MoELayer, x_BSD: Tensor, grad_BSD: Tensor, ids_TK: Tensor | None, case: Case) -> dict[str, Any]:
    """Relative errors of the output and of the input's gradient at some tokens, and of the gradients of one expert."""
    layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    out_BSD, stats = layer(x_BSD)
    out_BSD.backward(grad_BSD)
    with torch.no_grad():
        ids = layer.router(x_BSD.detach().flatten(0, 1)).topk_expert_ids
    counts = torch.bincount(ids.flatten(), minlength=case.shape.E)
    if ids_TK is not None and not torch.equal(ids, ids_TK):
        raise NotRunError(f"the router of backend {case.backend} does not take experts that are given")
    if not torch.equal(stats.tokens_per_expert.long(), counts):
        return {"wrong": "tokens_per_expert of the layer are not those of its router"}
    picked = torch.randperm(case.shape.T, device=x_BSD.device)[:SAMPLES]
    x, out, dx = (t.detach().flatten(0, 1)[picked] for t in (x_BSD, out_BSD, x_BSD.grad))
    weights = [weight.detach() for weight in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj)]
    expected, expected_dx = reference(
        x, layer.router.gate.weight.detach(), weights, ids[picked], grad_BSD.flatten(0, 1)[picked]
    )
    errors = {"output_error": error(out, expected), "input_gradient_error": error(dx, expected_dx)}
    limit = TOLERANCE[case.precision]
    wrong = [name for name, value in errors.items() if not value <= limit]
    busiest = round(counts.max().item() / counts.double().mean().item(), 3)
    found: dict[str, Any] = {"busiest_over_mean": busiest, "samples": len(picked), **errors}
    return found | ({"wrong": f"over {limit}: {', '.join(wrong)}"} if wrong else {})


def reference(
    x_nD: Tensor, gate_ED: Tensor, weights: list[Tensor], ids_nK: Tensor, grad_nD: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input for a few tokens, in float64."""
    x = x_nD.double().requires_grad_()
    scores_nE = (x @ gate_ED.double().T).softmax(-1)
    weights_nK = scores_nE.gather(1, ids_nK)
    weights_nK = weights_nK / weights_nK.sum(-1, keepdim=True)
    out = mixture(x, weights, ids_nK, weights_nK)
    (dx,) = torch.autograd.grad(out, x, grad_nD.double())
    return out.detach(), dx


def mixture(x_nD: Tensor, weights: list[Tensor], ids_nK: Tensor, weights_nK: Tensor) -> Tensor:
    """The experts' weighted sum in float64, one expert at a time."""
    out = torch.zeros_like(x_nD)
    for expert in ids_nK.unique().tolist():
        gate, up, down = (weight[expert].double() for weight in weights)
        token, slot = (ids_nK == expert).nonzero(as_tuple=True)
        rows = x_nD[token]
        hidden = F.silu(rows @ gate.T) * (rows @ up.T)
        out = out.index_add(0, token, (hidden @ down.T) * weights_nK[token, slot].unsqueeze(1))
    return out


def error(values: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(f"{((values.double() - expected).norm() / expected.norm()).item():.3g}")
