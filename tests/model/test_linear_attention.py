"""Blocks with linear attention: which ones, what stays wide in them, and gated attention beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moefoundry.adapters import apply_lora
from moefoundry.config import (
    ActivationCheckpointing,
    ConfigError,
    Fp8Config,
    Fp8Recipe,
    GqaConfig,
    LinearAttentionConfig,
    LinearBackend,
    LoraConfig,
    ModelConfig,
    MtpConfig,
    NormConfig,
    PrecisionConfig,
    QkNorm,
    UserError,
    load_recipe,
)
from moefoundry.model import linear_attention
from moefoundry.model.attention import GroupedQueryAttention
from moefoundry.model.context import attention_context
from moefoundry.model.linear_attention import GatedDeltaNet
from moefoundry.parallel import materialize
from moefoundry.planning.activations import block_activations
from moefoundry.planning.describe import count_parameters
from tests.conftest import QUICK
from tests.distributed import run_distributed
from tests.model.tiny import LINEAR, WIDTH, batch, gradients, meta_model, tiny_config, tiny_model


def config(linear: LinearAttentionConfig = LINEAR, mtp: int = 0, **options: object) -> ModelConfig:
    cfg = tiny_config(**options)  # type: ignore[arg-type]
    return replace(cfg, linear_attention=linear, mtp=MtpConfig(depth=mtp), norm=NormConfig(zero_centered=True))


def linear_blocks(cfg: ModelConfig) -> list[int]:
    return [i for i, block in enumerate(meta_model(cfg).blocks) if isinstance(block.attention, GatedDeltaNet)]


def test_an_interval_or_a_list_chooses_the_blocks_and_prediction_modules_have_attention() -> None:
    sizes = {"n_key_heads": 2, "n_value_heads": 4}
    assert linear_blocks(config(LinearAttentionConfig(**sizes), mtp=2, n_layers=6)) == [0, 1, 2, 4, 5]
    assert linear_blocks(config(LinearAttentionConfig(full_attention_interval=2, **sizes), n_layers=5)) == [0, 2, 4]
    assert linear_blocks(config(LinearAttentionConfig(full_attention_interval=1, **sizes))) == []
    assert linear_blocks(config(LinearAttentionConfig(layers=[2, 0], **sizes), mtp=1)) == [0, 2]


def test_parameters_are_those_of_the_sizes() -> None:
    """By hand: keys of 2 heads of 6, values of 4 heads of 10; a convolution of width 4 over 64 channels."""
    assert (LINEAR.n_key_heads, LINEAR.n_value_heads, LINEAR.key_head_dim, LINEAR.value_head_dim) == (2, 4, 6, 10)
    inside = WIDTH * (64 + 40 + 4 + 4) + 64 * 4 + 10 + 2 * 4 + 40 * WIDTH
    layers = replace(LINEAR, layers=[1])
    full, hybrid = config(replace(LINEAR, layers=[])), config(layers)
    softmax = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2
    assert count_parameters(hybrid).total - count_parameters(full).total == inside - softmax


def test_initial_decays_and_norms() -> None:
    model = meta_model(config())
    materialize(model, "cpu", seed=3)
    layer = model.layers[0].attention
    assert isinstance(layer, GatedDeltaNet)
    rates = layer.decay.A_log.exp()
    assert 0.01 <= rates.min() < rates.max() <= 16
    assert rates.unique().numel() == len(rates)
    assert layer.decay.dt_bias.eq(1).all()
    assert layer.head_norm.weight.eq(1).all()
    assert all(norm.weight.eq(0).all() for norm in (model.norm, model.layers[1].ffn_norm))


@pytest.mark.parametrize("qk_norm", list(QkNorm))
def test_an_output_gate_multiplies_each_heads_output(qk_norm: QkNorm) -> None:
    """``q_proj`` has a query and a gate of each head; without gates, and 0 for them, half of the output remains."""
    cfg = GqaConfig(n_heads=4, n_kv_heads=2, output_gate=True, qk_norm=qk_norm)
    model = replace(tiny_config(), attention=cfg, norm=NormConfig(zero_centered=True))
    torch.manual_seed(0)
    gated = GroupedQueryAttention(cfg, model)
    plain = GroupedQueryAttention(replace(cfg, output_gate=False), model)
    for parameter in gated.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = gated.state_dict()
    by_head = tensors["q_proj.weight"].unflatten(0, (4, 2, -1))
    plain.load_state_dict(tensors | {"q_proj.weight": by_head[:, 0].flatten(0, 1)})
    plain.o_proj, o_proj = torch.nn.Identity(), gated.o_proj
    x = torch.randn(2, 9, WIDTH)
    context = attention_context(model, torch.zeros(2, 9, dtype=torch.int64))
    gates = F.linear(x, by_head[:, 1].flatten(0, 1)).sigmoid()
    expected = o_proj(plain(x, context) * gates)
    torch.testing.assert_close(gated(x, context), expected, rtol=0, atol=1e-6)


def test_zero_centered_norms_are_those_with_weights_about_1() -> None:
    centered = tiny_model(config(replace(LINEAR, layers=[])))
    plain = tiny_model(replace(centered.cfg, norm=NormConfig()))
    plain.load_state_dict({n: t + 1 if n.endswith("norm.weight") else t for n, t in centered.state_dict().items()})
    torch.testing.assert_close(centered(batch()), plain(batch()), rtol=0, atol=1e-6)


def test_padding_at_the_end_changes_nothing() -> None:
    """Without document masks, too: what comes later reaches no state."""
    model, ids = tiny_model(config(backend="loop"), dtype=torch.float64), batch(2, 16)
    numbers = torch.zeros_like(ids)
    numbers[:, 11:] = -1
    labels = ids.masked_fill(numbers < 0, -100)
    padded = model(ids, labels, sequence_id=numbers)
    padded.total.backward()
    got = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    alone = model(ids[:, :11], ids[:, :11])
    alone.total.backward()
    torch.testing.assert_close(padded.total, alone.total, rtol=1e-6, atol=0)  # router losses are fp32 sums
    for name, grad in gradients(model).items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-6 * max(1.0, grad.abs().max().item()))


def test_projections_to_a_number_for_each_head_are_never_fp8() -> None:
    model = tiny_model(config(), precision=PrecisionConfig(fp8=Fp8Config(Fp8Recipe.rowwise)))
    linears = {name: type(module).__name__ for name, module in model.layers[0].attention.named_children()}
    assert linears["beta_proj"] == linears["decay_proj"] == "Linear"
    assert {linears[name] for name in ("qkv_proj", "gate_proj", "o_proj")} == {"CoarseLinear"}
    excluded = Fp8Config(Fp8Recipe.rowwise, exclude=["lm_head", "*.router.gate", "layers.*.attention.qkv_proj"])
    model = tiny_model(config(), precision=PrecisionConfig(fp8=excluded))
    assert type(model.layers[0].attention.qkv_proj) is torch.nn.Linear
    assert model(batch(), batch()).total.isfinite()


def test_adapters_find_its_projections() -> None:
    model = meta_model(config())
    apply_lora(model, LoraConfig(rank=4, targets=["attention.qkv_proj", "attention.o_proj", "attention.q_proj"]))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora")]
    expected = [f"layers.{i}.attention.{p}" for i in (0, 1) for p in ("qkv_proj", "o_proj")]
    assert adapted == [*expected, "layers.2.attention.q_proj", "layers.2.attention.o_proj"]
    materialize(model, "cpu", 0)
    model(batch(), batch()).total.backward()
    assert {name.rpartition(".")[2] for name in gradients(model)} == {"a", "b"}


def test_kernels_that_are_not_installed_are_refused_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_attention, "has_fused", lambda: False)
    with pytest.raises(UserError, match=r"^model\.linear_attention\.backend: fla, and the package flash-linear-atten"):
        meta_model(config(replace(LINEAR, backend=LinearBackend.fla)))
    assert not meta_model(config()).layers[0].attention.fused
    monkeypatch.setattr(linear_attention, "has_fused", lambda: True)
    assert meta_model(config()).layers[0].attention.fused
    assert not meta_model(config(replace(LINEAR, backend=LinearBackend.torch))).layers[0].attention.fused


def test_what_is_kept_for_the_backward_pass_is_estimated() -> None:
    cfg = replace(
        config(LinearAttentionConfig(n_key_heads=2, n_value_heads=4, key_head_dim=16, value_head_dim=24)), d_model=64
    )
    model = tiny_model(cfg)
    layer, x = model.layers[0].attention, torch.randn(1, 256, 64, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, attention_context(cfg, torch.zeros(1, 256, dtype=torch.int64)))
    measured = sum(storage.nbytes() for storage in kept.values()) / 256
    dense = replace(cfg, linear_attention=None)
    estimates = [
        block_activations(each, False, ActivationCheckpointing.none, 4, linear=each is cfg).saved
        for each in (cfg, dense)
    ]
    softmax = 4 * (64 + 2 * 64 + 2 * 32) + 4 * 4  # the module's docstring
    assert estimates[0] - (estimates[1] - softmax) == pytest.approx(measured, rel=0.05)  # a norm is two kernels here


def bf16_step() -> tuple[set[torch.dtype], float, float]:
    """Dtypes that the decay's parameters have in the forward pass; and loss and gradient of them."""
    from moefoundry.config import Compute, MeshConfig
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import parallelize

    meshes, model = build_meshes(resolve_degrees(MeshConfig(1, 2, 2), 2), "cpu"), meta_model(config())
    parallelize(model, meshes, PrecisionConfig(compute=Compute.bf16), ActivationCheckpointing.full)
    materialize(model, "cpu", 0)
    seen: set[torch.dtype] = set()
    decay = model.layers[0].attention.decay
    decay.register_forward_hook(lambda module, _, out: seen.update({module.A_log.dtype, out.dtype}))
    losses = model(batch(), batch())
    losses.total.backward()
    grad = decay.A_log.grad.full_tensor()
    return seen, losses.total.item(), grad.norm().item()


def test_decays_stay_in_fp32_on_a_mesh_that_computes_in_bf16() -> None:
    model = tiny_model(config())
    materialize(model, "cpu", 0)
    expected = model(batch(), batch()).total
    expected.backward()
    norm = model.layers[0].attention.decay.A_log.grad.norm().item()
    for seen, loss, grad_norm in run_distributed(bf16_step, 2):
        assert seen == {torch.float32}
        assert loss == pytest.approx(expected.item(), rel=2e-2)
        assert grad_norm == pytest.approx(norm, rel=0.2)


SIZES = "n_key_heads: 2, n_value_heads: 4"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("n_key_heads: 3, n_value_heads: 4", "n_key_heads: n_value_heads 4 is not divisible by 3 heads of keys"),
        (f"{SIZES}, layers: [0, 99]", "layers: no block 99, for model.n_layers is"),
        (f"{SIZES}, layers: [0], full_attention_interval: 2", "full_attention_interval: 2 has no effect"),
        ("n_key_heads: 2", "n_value_heads: "),
        (f"{SIZES}, backend: cuda", "backend: got 'cuda'"),
        (f"{SIZES}, linear_key_head_dim: 8", "did you mean 'model.linear_attention.key_head_dim'"),
    ],
)
def test_what_means_nothing_is_named(mapping: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [*QUICK, f"model.linear_attention={{{mapping}}}"])
    assert message in str(caught.value)


def test_a_recipe_declares_it() -> None:
    cfg = load_recipe(None, [*QUICK, f"model.linear_attention={{{SIZES}, layers: [0, 1]}}"]).model
    assert [cfg.is_linear(index) for index in range(3)] == [True, True, False]
