"""``compile: true`` makes other kernels and the same numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from moefoundry.adapters import apply_lora
from moefoundry.config import ActivationCheckpointing, LoraConfig, MeshConfig, PrecisionConfig
from tests.distributed import run_distributed
from tests.model.tiny import batch, gradients, meta_model, tiny_config

MODES = ["none", "selective", "full"]


def step(
    mode: str, backend: str | None, sharded: bool = False, lora: LoraConfig | None = None, sinks: bool = False
) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss and gradients of a step, and how many modules have been compiled by ``backend``."""
    from torch.distributed.tensor import DTensor

    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import materialize, parallelize

    meshes = build_meshes(resolve_degrees(MeshConfig(1, 2, 2), 2), "cpu") if sharded else None
    cfg = tiny_config()
    cfg.attention = replace(cfg.attention, sinks=sinks)
    model = meta_model(cfg)
    if lora is not None:
        apply_lora(model, lora)
    with pytest.MonkeyPatch.context() as patch:
        if backend is not None:
            patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        parallelize(model, meshes, PrecisionConfig(), ActivationCheckpointing(mode), compile=backend is not None)
        materialize(model, "cpu", 0)
        move_adapters(model)
        loss = model(batch(), batch()).total
        loss.backward()
    grads = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients(model).items()}
    return loss.detach(), grads, sum(module._compiled_call_impl is not None for module in model.modules())


def move_adapters(model: torch.nn.Module) -> None:
    """Their B is zero at the beginning, and so are the gradients of A then."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora.b"):
                parameter.add_(0.1)


def assert_same(step: tuple[Tensor, dict[str, Tensor], int], eager: tuple[Tensor, dict[str, Tensor], int]) -> None:
    loss, grads, compiled = step
    # three attentions, one dense FFN, two routers, two shared experts
    assert (compiled, eager[2]) == (8, 0)
    torch.testing.assert_close(loss, eager[0], rtol=1e-6, atol=0)
    assert grads.keys() == eager[1].keys()
    for name, grad in grads.items():
        error = (grad - eager[1][name]).norm() / eager[1][name].norm()
        assert error <= 1e-5, f"{name}: {error:.1e}"


def compare(
    mode: str, backend: str, sharded: bool = False, lora: LoraConfig | None = None, sinks: bool = False
) -> None:
    assert_same(step(mode, backend, sharded, lora, sinks), step(mode, None, sharded, lora, sinks))


@pytest.mark.parametrize(
    "mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES if mode != "full")]
)
def test_compiled_parts_compute_the_same(mode: str) -> None:
    run_distributed(compare, 1, mode, "aot_eager")


@pytest.mark.slow
def test_compiled_parts_compute_the_same_on_a_mesh() -> None:
    run_distributed(compare, 2, "selective", "aot_eager", True)


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "mesh"])
@pytest.mark.slow
def test_compiled_parts_with_adapters_compute_the_same(sharded: bool) -> None:
    lora = LoraConfig(rank=4, dora=True, targets=["attention", "dense", "shared_experts"])
    run_distributed(compare, 1 + sharded, "full", "aot_eager", sharded, lora)


def graphs_of_parts() -> dict[str, list[tuple[int, int]]]:
    """Graphs of each compiled part, and breaks between them."""
    from moefoundry.config import AttentionConfig, GqaConfig, MlaConfig, QkNorm
    from moefoundry.model.context import Documents, attention_contexts
    from tests.model.tiny import tiny_model, use_attention

    found: dict[str, list[tuple[int, int]]] = {}
    mla = MlaConfig(n_heads=4, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    gqa = GqaConfig(n_heads=4, n_kv_heads=2, qk_norm=QkNorm.head)
    kinds: list[tuple[AttentionConfig, torch.dtype]] = [
        (gqa, torch.float32),
        (gqa, torch.bfloat16),
        (mla, torch.float32),
        (mla, torch.bfloat16),
    ]
    for attention, dtype in kinds:
        cfg, ids = tiny_config(n_layers=2), batch()
        use_attention(cfg, attention)
        model = tiny_model(cfg).to(dtype)
        dense, sparse = model.layers
        x_BSD = model.embed_tokens(ids)
        documents = Documents(torch.zeros_like(ids))
        context = attention_contexts(cfg, [dense.kind], ids, documents, dtype=dtype)[dense.kind]
        parts = {"attention": (dense.attention, context), "dense": (dense.ffn,), "router": (sparse.ffn.router,)}
        for name, (part, *inputs) in parts.items():
            torch._dynamo.reset()
            explained = torch._dynamo.explain(part)(x_BSD.flatten(0, 1) if name == "router" else x_BSD, *inputs)
            found.setdefault(name, []).append((explained.graph_count, explained.graph_break_count))
    return found


def test_each_compiled_part_is_one_graph() -> None:
    [found] = run_distributed(graphs_of_parts, 1)
    assert found == dict.fromkeys(["attention", "dense", "router"], [(1, 0)] * 4)


def whole_layer() -> None:
    """An MoE layer compiles as one graph, or this raises; the numbers stay the same."""
    from moefoundry.config import MoEConfig
    from moefoundry.moe.layer import MoELayer

    torch.manual_seed(0)
    cfg = MoEConfig(num_experts=8, top_k=2, expert_hidden_size=64, num_shared_experts=0, backend="grouped_mm")
    layer = MoELayer(128, cfg).train()
    layer.experts.to(torch.bfloat16)  # torch's compiler knows no grouped_mm of fp32
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_BSD = torch.randn(2, 64, 128, dtype=torch.bfloat16)

    def outputs(call: torch.nn.Module) -> list[Tensor]:
        x = x_BSD.clone().requires_grad_()
        out, stats = call(x)
        loss = out.float().square().sum() + stats.balance_loss
        return [out, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    eager = outputs(layer)
    torch._dynamo.reset()
    for mine, other in zip(outputs(torch.compile(layer, backend="aot_eager", fullgraph=True)), eager, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
def test_a_layer_of_experts_is_one_graph() -> None:
    run_distributed(whole_layer, 1)


@pytest.mark.slow
def test_kernels_of_the_default_compiler_compute_the_same() -> None:
    run_distributed(compare, 1, "none", "inductor", timeout=280.0)


def test_the_default_compiler_leaves_what_is_kept_as_it_is() -> None:
    """With sinks, attention's result is scaled in place, if nothing else in the compiled code reads it."""
    run_distributed(compare, 1, "selective", "inductor", False, None, True, timeout=280.0)
