"""Norms: torch's own, in at least fp32."""

import pytest
import torch
from torch import nn

from moefoundry.config import AttentionBias, AttentionConfig, GqaConfig, MlaConfig, NormConfig, NormKind, QkNorm
from moefoundry.model.norm import LayerNorm, RMSNorm, build_norm
from moefoundry.parallel import materialize
from tests.model.tiny import batch, meta_model, tiny_config, tiny_model

WIDTH = 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(NormKind))
def test_norm_is_torchs_in_at_least_fp32(kind: NormKind, dtype: torch.dtype) -> None:
    ours = build_norm(WIDTH, NormConfig(kind=kind, eps=1e-3))
    theirs = {
        NormKind.rmsnorm: nn.RMSNorm(WIDTH, eps=1e-3, dtype=torch.float64),
        NormKind.layernorm: nn.LayerNorm(WIDTH, eps=1e-3, bias=False, dtype=torch.float64),
    }[kind]
    torch.manual_seed(0)
    weight, x = torch.randn(WIDTH), 1 + torch.randn(4, WIDTH, dtype=torch.float64)
    ours.load_state_dict({"weight": weight})
    theirs.load_state_dict({"weight": weight})
    out = ours.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    if dtype == torch.bfloat16:  # rounded inputs and weights, and one more rounding at the end: nothing between
        theirs.weight.data, x = weight.to(dtype).double(), x.to(dtype).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), theirs(x), rtol=4 * eps, atol=0 if dtype == torch.bfloat16 else 4 * eps)


@pytest.mark.parametrize("kind", list(NormKind))
def test_of_a_narrow_input_only_itself_is_kept_and_gradients_are_those_of_fp32(kind: NormKind) -> None:
    norm = build_norm(WIDTH, NormConfig(kind=kind))
    torch.manual_seed(0)
    nn.init.normal_(norm.weight, mean=1)
    x, grad = (torch.randn(4, WIDTH).to(torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = norm(x)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), norm.weight.data_ptr()}
    got = torch.autograd.grad(out, (x, norm.weight), grad)
    wide = x.detach().float().requires_grad_()
    expected = torch.autograd.grad(norm(wide), (wide, norm.weight), grad.float())
    assert torch.equal(got[0], expected[0].to(torch.bfloat16))
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_is_added_and_trains(kind: NormKind, dtype: torch.dtype) -> None:
    norm, plain = build_norm(WIDTH, NormConfig(kind=kind, bias=True)), build_norm(WIDTH, NormConfig(kind=kind))
    torch.manual_seed(0)
    weight, bias, x, grad = torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    norm.load_state_dict({"weight": weight, "bias": bias})
    plain.load_state_dict({"weight": weight})
    x = x.to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = plain.double()(wide) + bias
    out = norm(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=1e-6)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    for ours, theirs in ((x, wide.grad), (norm.weight, plain.weight.grad), (norm.bias, grad.to(dtype).double().sum(0))):
        torch.testing.assert_close(ours.grad.double(), theirs, rtol=4 * eps, atol=1e-5)


def test_the_recipes_norm_is_the_blocks_and_the_last_one() -> None:
    cfg = tiny_config()
    cfg.norm = NormConfig(kind=NormKind.layernorm, eps=1e-5)
    norms = {name: module for name, module in meta_model(cfg).named_modules() if isinstance(module, LayerNorm)}
    assert norms.keys() == {"norm", *(f"layers.{i}.{kind}_norm" for i in range(3) for kind in ("attention", "ffn"))}
    assert all(norm.eps == 1e-5 and list(dict(norm.named_parameters())) == ["weight"] for norm in norms.values())
    assert not any(isinstance(module, RMSNorm) for module in meta_model(cfg).modules())
    assert tiny_model(cfg)(batch()).isfinite().all()


@pytest.mark.parametrize(
    ("attention", "norms"),
    [
        (GqaConfig(n_heads=8, n_kv_heads=4, qk_norm=QkNorm.full, bias=AttentionBias.all), 2),
        (MlaConfig(n_heads=8, q_lora_rank=8, kv_lora_rank=8), 2),
    ],
    ids=["gqa", "mla"],
)
def test_initial_norms_are_one_and_biases_zero(attention: AttentionConfig, norms: int) -> None:
    cfg = tiny_config(n_layers=1)
    cfg.attention, cfg.norm = attention, NormConfig(kind=NormKind.layernorm)
    model = meta_model(cfg)
    materialize(model, "cpu", seed=0)
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    assert sum(name.endswith("norm.weight") for name in vectors) == 3 + norms
    for name, value in vectors.items():
        assert torch.equal(value, torch.full_like(value, float(name.endswith("norm.weight")))), name
