"""BF16 on one device computes what FSDP computes on a mesh of one rank, bit for bit, and keeps the parameters fp32."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    AdamWConfig,
    Compute,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    PrecisionConfig,
)
from moefoundry.mesh import Meshes
from moefoundry.model.transformer import MoETransformer
from tests.distributed import run_distributed
from tests.model.tiny import batch, meta_model, tiny_config
from tests.test_parallel import model_config, with_linear_attention

BF16 = PrecisionConfig(compute=Compute.bf16)


class Case(NamedTuple):
    """A model, and how it is trained."""

    cfg: ModelConfig
    mode: ActivationCheckpointing = ActivationCheckpointing.none
    lora: LoraConfig | None = None
    compile: bool = False


CASES = {
    "everything": Case(model_config(6), ActivationCheckpointing.full),
    "linear attention": Case(with_linear_attention(model_config(6)), ActivationCheckpointing.selective),
    "tied": Case(tiny_config(tie_embeddings=True)),
    "adapters": Case(tiny_config(), lora=LoraConfig(rank=8, dora=True)),
    "compiled": Case(tiny_config(n_layers=2), ActivationCheckpointing.full, compile=True),
}


def build(case: Case, meshes: Meshes | None) -> MoETransformer:
    from moefoundry.adapters import apply_lora
    from moefoundry.parallel import materialize, parallelize

    model = meta_model(case.cfg)
    if case.lora is not None:
        apply_lora(model, case.lora)
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        parallelize(model, meshes, BF16, case.mode, case.compile)
    materialize(model, "cpu", 0)
    return model


def train(case: Case, meshes: Meshes | None) -> dict[str, Tensor]:
    """Two steps of two micro-batches: every loss, the gradients of every step, and the parameters."""
    from moefoundry.optim import build_adamw

    model = build(case, meshes)
    optimizer = build_adamw(model, AdamWConfig(lr=1e-2))
    found = {}
    for step in range(2):
        for micro in range(2):
            ids = batch(seed=10 * step + micro)
            loss = model(ids, ids).total
            loss.backward()
            found[f"loss {step} {micro}"] = loss.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {step} {name}"] = whole(parameter.grad).clone()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found["evaluation"] = model.eval()(batch(), batch()).total
    return found | {name: whole(value) for name, value in model.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(case: Case) -> None:
    import torch.distributed as dist

    from moefoundry.mesh import build_meshes, resolve_degrees

    ours = train(case, None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    theirs = train(case, build_meshes(resolve_degrees(MeshConfig(), 1), "cpu"))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("gradient") for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{name}: {(value - theirs[name]).abs().max():.1e}"
        assert value.dtype == theirs[name].dtype == torch.float32, name


SLOW = ("linear attention", "compiled")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()]
)
def test_one_device_computes_what_one_rank_of_fsdp_computes(case: Case) -> None:
    run_distributed(compare, 1, case)


def test_a_copy_is_made_when_its_parameter_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    foreach_copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda out, of: (copied.append(len(of)), foreach_copy(out, of)))
    model, ids = build(Case(tiny_config(tie_embeddings=True)), None), batch()
    routers = sum("router" in name for name, _ in model.named_parameters())
    for _ in range(3):
        model(ids, ids).total.backward()
    assert copied == [len(list(model.parameters())) - routers]
    with torch.no_grad():
        dict(model.named_parameters())["norm.weight"] += 1
    model.to("cpu")
    model(ids, ids)
    assert copied[1:] == [1]
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.norm.weight.dtype == torch.bfloat16
    assert model.layers[1].ffn.router.gate.weight.dtype == torch.float32
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_copies_that_a_module_wants_adjacent_are_halves_of_one_tensor() -> None:
    """Before and after a step; the gradients are those of copies that lie apart."""
    from moefoundry.moe.experts import GroupedExperts
    from moefoundry.ops.quack_experts import stacked

    found = []
    for adjacent in ((), ("gate_proj", "up_proj")):
        model = build(CASES["tied"], None)
        experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
        for module in experts:
            module.adjacent = adjacent
        for step in range(2):
            model(batch(seed=step), batch(seed=step)).total.backward()
            for module in experts:
                both = stacked(module.gate_proj, module.up_proj)
                assert (both.data_ptr() == module.gate_proj.data_ptr()) == bool(adjacent)
                assert torch.equal(both, torch.cat([module.gate_proj, module.up_proj], dim=1))
            torch.optim.SGD(model.parameters(), lr=1.0).step()
        found.append([parameter.grad for parameter in model.parameters()])
    for apart, together in zip(*found, strict=True):
        assert torch.equal(apart, together)
