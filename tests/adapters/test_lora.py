"""Adapters compute what the merged weights compute, and their gradients follow from those of the merged weights."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefoundry.adapters import Adapter, apply_lora, merge, unloaded, unmerge
from moefoundry.adapters.merge import adapted_weights
from moefoundry.config import (
    ActivationCheckpointing,
    AuxLossScope,
    Compute,
    ConfigError,
    Fp8Config,
    Fp8Recipe,
    LoraConfig,
    MlaConfig,
    ModelConfig,
    PrecisionConfig,
    SwigluConfig,
)
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import materialize, parallelize
from tests.model.tiny import EXPERTS, batch, tiny_config

RANK, ALPHA = 4, 6.0
GROUPS = ["attention", "dense", "shared_experts", "experts"]
MLA = MlaConfig(n_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


def lora_config(**changes: object) -> LoraConfig:
    return replace(LoraConfig(rank=RANK, alpha=ALPHA), **changes)  # type: ignore[arg-type]


def adapted_model(
    lora: LoraConfig,
    cfg: ModelConfig | None = None,
    precision: PrecisionConfig | None = None,
    checkpointing: str = "none",
    seed: int = 0,
) -> MoETransformer:
    """A model whose adapters have been moved off their initial values, so that all of them matter."""
    model = meta_model(cfg or tiny_config())
    apply_lora(model, lora)
    parallelize(model, None, precision or PrecisionConfig(), ActivationCheckpointing(checkpointing))
    materialize(model, "cpu", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b") or ".lora." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dense_reference(model: MoETransformer) -> MoETransformer:
    """The plain model of the merged weights, all of which train."""
    plain = copy.deepcopy(model)
    merge(plain)
    unloaded(plain)
    return plain.requires_grad_(True)  # type: ignore[return-value]


def trained(model: MoETransformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_close(found: Tensor, expected: Tensor, name: str = "", tolerance: float = 1e-4) -> None:
    assert expected.norm() > 0, name
    assert (found - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("backend", ["auto", "grouped_mm", "loop"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_gradients_are_those_of_the_merged_weights(backend: str, checkpointing: str) -> None:
    """By the chain rule through W + s B A: dB = s dW A^T, dA = s B^T dW."""
    model = adapted_model(lora_config(train_router=True), tiny_config(backend=backend), checkpointing=checkpointing)
    reference = dense_reference(model)
    ids = batch()
    loss, expected = model(ids, ids).total, reference(ids, ids).total
    assert_close(loss, expected, tolerance=1e-6)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    assert len(adapters) == 3 * 4 + 3 + 2 * (3 + 3)
    for name, adapter in adapters.items():
        owner, _, weight = name.partition(".lora")
        grad_w = gradients[f"{owner}{weight or '.weight'}"]
        assert_close(adapter.b.grad, adapter.scale * grad_w @ adapter.a.mT, f"{name}.b")
        assert_close(adapter.a.grad, adapter.scale * adapter.b.mT @ grad_w, f"{name}.a")
    gates = [name for name in trained(model) if name.endswith("router.gate.weight")]
    assert len(gates) == 2
    for name in gates:
        assert_close(trained(model)[name].grad, gradients[name], name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert gradients.keys() == {name for name, _ in model.named_parameters() if ".lora." not in name}


@pytest.mark.parametrize(
    "targets", [[group] for group in GROUPS] + [["attention.q_proj", "experts.down_proj"]], ids=str
)
def test_targets_alone_get_adapters(targets: list[str]) -> None:
    model = adapted_model(lora_config(targets=targets))
    groups = {
        "attention": "attention",
        "dense": "layers.0.ffn",
        "shared_experts": "shared_experts",
        "experts": "ffn.experts",
    }
    places = [target.split(".") for target in targets]
    for name in trained(model):
        assert any(groups[place[0]] in name and place[-1] in (*groups, *name.split(".")) for place in places), name
    assert_close(model(batch()), dense_reference(model)(batch()), tolerance=1e-5)


@pytest.mark.parametrize("recipe", [None, Fp8Recipe.deepseek_v3], ids=["fp32", "fp8"])
def test_experts_with_biases_and_a_clamped_activation(recipe: Fp8Recipe | None) -> None:
    cfg = tiny_config()
    cfg.moe.projection_bias, cfg.swiglu = True, SwigluConfig(alpha=1.7, limit=0.5, offset=1.0)
    model = adapted_model(lora_config(targets=["experts"]), cfg, PrecisionConfig(fp8=Fp8Config(recipe)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    assert not any("bias" in name for name in trained(model))
    reference = dense_reference(model)
    assert_close(model(batch()), reference(batch()), tolerance=1e-5 if recipe is None else 0.1)
    with torch.no_grad():
        biases = [parameter for name, parameter in reference.named_parameters() if name.endswith("proj_bias")]
        before = reference(batch())
        for bias in biases:
            bias.zero_()
        assert len(biases) == 2 * 3
        assert (reference(batch()) - before).norm() > 0.1 * before.norm(), "they matter"


def test_training_begins_with_the_model_of_the_base() -> None:
    cfg = tiny_config()
    model = meta_model(cfg)
    apply_lora(model, lora_config(dora=True))
    parallelize(model, None, PrecisionConfig())
    materialize(model, "cpu", 0)
    base = meta_model(cfg)
    parallelize(base, None, PrecisionConfig())
    materialize(base, "cpu", 0)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert_close(model(batch()), base(batch()), tolerance=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_merged_weights_compute_the_same(dora: bool, attention: str) -> None:
    cfg = tiny_config() if attention == "gqa" else replace(tiny_config(), attention=MLA)
    model = adapted_model(lora_config(dora=dora, use_rslora=True), cfg)
    assert next(adapted_weights(model)).adapter.scale == ALPHA / RANK**0.5
    assert_close(model(batch()), dense_reference(model)(batch()), tolerance=1e-5)


def test_merging_is_undone_to_rounding() -> None:
    model = adapted_model(lora_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merge(model)
    moved = {
        name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if ".lora." not in name
    }
    unmerge(model)
    for weight in ("layers.0.attention.q_proj.weight", "layers.1.ffn.experts.down_proj"):
        assert moved[weight] > 0.01
    for name, parameter in model.named_parameters():
        largest = before[name].abs().max().item() + 1
        assert (parameter - before[name]).abs().max() <= 2 * torch.finfo(torch.float32).eps * largest, name


def test_unmerging_magnitudes_is_refused() -> None:
    with pytest.raises(ValueError, match="load the base anew"):
        unmerge(adapted_model(lora_config(dora=True)))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["attention.w_proj"], "lora.targets[0]: the model has no attention.w_proj"),
        (["experts", "dense.q_proj"], "lora.targets[1]: the model has no dense.q_proj"),
        (["shared_experts"], "lora.targets: the model has none of shared_experts"),
    ],
)
def test_targets_that_the_model_lacks_are_named(targets: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_lora(meta_model(tiny_config(num_shared_experts=0)), lora_config(targets=targets))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "precision",
    [
        PrecisionConfig(compute=Compute.bf16_emulated),
        *(PrecisionConfig(fp8=Fp8Config(recipe)) for recipe in Fp8Recipe),
        PrecisionConfig(compute=Compute.bf16_emulated, fp8=Fp8Config(Fp8Recipe.deepseek_v3)),
    ],
    ids=["emulated", *Fp8Recipe, "emulated-deepseek_v3"],
)
def test_adapters_beside_products_of_other_precisions(precision: PrecisionConfig) -> None:
    """Gradients are near those of fp32, but not the same: frozen products are rounded. Every token has all experts."""
    cfg = tiny_config(top_k=EXPERTS, n_layers=2, std=0.1)
    exact, rounded = (adapted_model(lora_config(), cfg, each) for each in (PrecisionConfig(), precision))
    ids = batch()
    for model in (exact, rounded):
        model(ids, ids).total.backward()
    assert trained(exact).keys() == trained(rounded).keys()
    for name, parameter in trained(rounded).items():
        expected = trained(exact)[name].grad
        assert 0 < (parameter.grad - expected).norm() < 0.2 * expected.norm(), name


def test_frozen_experts_in_fp8_compute_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do frozen dense FFNs and shared experts."""
    from moefoundry.ops.fp8 import feed_forward

    fp8 = PrecisionConfig(fp8=Fp8Config(Fp8Recipe.deepseek_v3))
    model, ids, products = adapted_model(lora_config(targets=["attention"]), precision=fp8), batch(), []
    monkeypatch.setattr(feed_forward, "wgrad", lambda *args: products.append(args))
    model(ids, ids).total.backward()
    assert products == []
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_dropout_acts_in_training_only() -> None:
    model = adapted_model(lora_config(dropout=0.5), checkpointing="full")
    reference = dense_reference(model).eval()
    ids = batch()
    torch.manual_seed(0)
    first = model(ids, ids).total
    assert abs(first - reference(ids, ids).total) > 1e-4
    first.backward()  # the recomputed forward pass draws the same numbers, or shapes alone would fit
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    again = adapted_model(lora_config(dropout=0.5))
    torch.manual_seed(0)
    again(ids, ids).total.backward()
    for name, parameter in trained(again).items():
        assert_close(found[name], parameter.grad, name)
    assert_close(model.eval()(ids), reference(ids), tolerance=1e-5)


def test_capacity_drops_rows_of_adapters_too() -> None:
    cfg = tiny_config(scope=AuxLossScope.micro_batch.value)
    model = adapted_model(lora_config(), replace(cfg, moe=replace(cfg.moe, capacity_factor=0.5)))
    reference, ids = dense_reference(model), batch()
    losses = model(ids, ids)
    assert losses.dropped_slots.sum() > 0
    assert_close(losses.total, reference(ids, ids).total, tolerance=1e-6)
