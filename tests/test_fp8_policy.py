"""FP8 as a transform of the model: which products it takes over, and what it composes with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moefoundry.config import (
    Compute,
    Fp8Backend,
    Fp8Config,
    Fp8Recipe,
    MeshConfig,
    MlaConfig,
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
    UserError,
)
from moefoundry.model.norm import RMSNorm
from moefoundry.model.transformer import CausalLMLosses, MoETransformer
from moefoundry.moe.experts import FeedForward, GroupedExperts
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.fp8 import Format, QuantizedTensor, quantize
from moefoundry.parallel import materialize, moe_layers, parallelize
from moefoundry.precision import (
    CoarseLinear,
    Fp8Experts,
    Fp8FeedForward,
    Fp8Linear,
    apply_precision,
    describe_fp8,
)
from tests.distributed import run_distributed
from tests.model.tiny import batch, gradients, meta_model, tiny_config, tiny_model
from tests.ops.fp8.test_layers import Kept
from tests.test_activation_checkpointing import LiveMemory

MODES = ["none", "selective", "full"]
CPU = torch.device("cpu")


def fp8(recipe: str = "deepseek_v3", **keys: object) -> PrecisionConfig:
    return PrecisionConfig(compute=Compute.bf16_emulated, fp8=Fp8Config(recipe=Fp8Recipe(recipe), **keys))


def transformed(precision: PrecisionConfig) -> MoETransformer:
    model = meta_model(tiny_config())
    apply_precision(model, precision)
    return model


def mla_config() -> ModelConfig:
    cfg = tiny_config()
    cfg.attention = MlaConfig(
        n_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    return cfg


def step(model: MoETransformer) -> tuple[CausalLMLosses, dict[str, Tensor]]:
    losses = model(batch(), batch())
    losses.total.backward()
    return losses, gradients(model)


def names(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_every_linear_and_expert_but_gates_and_head_is_fp8() -> None:
    model = transformed(fp8())
    assert names(model, Fp8Experts) == {"layers.1.ffn.experts", "layers.2.ffn.experts"}
    dense = {"layers.0.ffn", "layers.1.ffn.shared_experts", "layers.2.ffn.shared_experts"}
    assert names(model, Fp8FeedForward) == dense
    attention = {f"layers.{i}.attention.{p}_proj" for i in range(3) for p in "qkvo"}
    inside = {f"{name}.{p}_proj" for name in dense for p in ("gate", "up", "down")}
    assert names(model, Fp8Linear) == attention | inside
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {"layers.1.ffn.router.gate", "layers.2.ffn.router.gate"}


def test_only_the_layer_after_attention_keeps_e5m6() -> None:
    kept = {name: module.kept for name, module in transformed(fp8()).named_modules() if isinstance(module, Fp8Linear)}
    assert {name for name, format in kept.items() if format is Format.E5M6} == {
        f"layers.{i}.attention.o_proj" for i in range(3)
    }


def test_coarse_recipes_take_over_the_same_layers() -> None:
    model = transformed(fp8("rowwise"))
    assert names(model, CoarseLinear) == names(transformed(fp8()), Fp8Linear)
    assert not names(model, Fp8Experts)


@pytest.mark.parametrize("pattern", ["layers.0", "*.experts", "*.down_proj"])
def test_excluded_modules_stay_as_they_were(pattern: str) -> None:
    model = transformed(fp8(exclude=["lm_head", "*.router.gate", pattern]))
    taken = names(model, Fp8Linear) | names(model, Fp8Experts)
    if pattern == "layers.0":
        assert not any(name.startswith("layers.0.") for name in taken)
        assert "layers.1.attention.q_proj" in taken
    elif pattern == "*.experts":
        assert {type(module) for module in model.modules() if isinstance(module, GroupedExperts)} == {GroupedExperts}
    else:  # the FFN as a whole would not ask its down_proj
        assert {type(module) for module in model.modules() if isinstance(module, FeedForward)} == {FeedForward}
        assert "layers.0.ffn.up_proj" in taken
        assert "layers.0.ffn.down_proj" not in taken


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"precision\.fp8\.exclude: no module is named 'layer\.0'; did you mean 'layers"
    ):
        transformed(fp8(exclude=["lm_head", "layer.0"]))


def test_head_and_gates_stay_as_they_are_whatever_is_excluded() -> None:
    everything, usual = (names(transformed(fp8(**keys)), Fp8Linear) for keys in ({"exclude": []}, {}))
    assert everything == usual
    assert not any(name == "lm_head" or name.endswith("router.gate") for name in everything)


def test_the_backend_is_said_and_one_that_cannot_run_is_refused() -> None:
    assert describe_fp8(fp8().fp8, CPU) == "deepseek_v3 by reference (its kernels need a CUDA device, not cpu)"
    assert describe_fp8(fp8(backend=Fp8Backend.reference).fp8, CPU) == "deepseek_v3 by reference"
    assert describe_fp8(fp8("rowwise").fp8, CPU) == "rowwise, rounded and multiplied in fp32"
    with pytest.raises(UserError, match=r"precision\.fp8\.backend: backend triton cannot run: .* CUDA device"):
        describe_fp8(fp8(backend=Fp8Backend.triton).fp8, CPU)


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_names_dtypes_and_initial_values_of_parameters_are_unchanged(recipe: str) -> None:
    plain, ours = tiny_model(tiny_config()), tiny_model(tiny_config(), precision=fp8(recipe))
    assert list(ours.state_dict()) == list(plain.state_dict())
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, plain.state_dict()[name])


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_a_step_is_near_the_unquantized_one_and_every_parameter_learns(recipe: str) -> None:
    exact, _ = step(tiny_model(tiny_config()))
    losses, grads = step(model := tiny_model(tiny_config(), precision=fp8(recipe)))
    assert losses.total != exact.total
    torch.testing.assert_close(losses.total, exact.total, rtol=2e-2, atol=0)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads.values())


@pytest.mark.parametrize("config", [tiny_config, mla_config], ids=["gqa", "mla"])
@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_activation_checkpointing_gives_the_same_bits(recipe: str, config) -> None:
    losses, grads = step(tiny_model(config(), precision=fp8(recipe)))
    for mode in MODES[1:]:
        other_losses, other_grads = step(tiny_model(config(), precision=fp8(recipe), activation_checkpointing=mode))
        assert torch.equal(losses.total, other_losses.total)
        assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())


def test_selective_checkpointing_multiplies_nothing_twice() -> None:
    forward, recomputed = [], []
    model = tiny_model(tiny_config(), precision=fp8(), activation_checkpointing="selective")

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self, calls: list[torch.Size]) -> None:
            super().__init__()
            self.calls = calls

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.moefoundry.fp8_multiply.default:
                self.calls.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with Watch(forward):
        total = model(batch(), batch()).total
    with Watch(recomputed):
        total.backward()
    # one Dgrad for each Fprop
    assert len(recomputed) == len(forward) > 0


def test_up_projections_of_latent_attention_are_recomputed_with_the_same_bits() -> None:
    kept, results = {}, {}
    for recompute in (False, True):
        model = tiny_model(mla_config(), precision=fp8())
        assert all(block.attention.recompute_up_projections for block in model.blocks), "the recipe asks for it"
        for block in model.blocks:
            block.attention.recompute_up_projections = recompute
        with LiveMemory() as memory:
            losses = model(batch(), batch())
        kept[recompute] = memory.bytes_alive()
        losses.total.backward()
        results[recompute] = losses.total.detach(), gradients(model)
    cfg, tokens = mla_config().attention, batch().numel()
    query_and_key = 2 * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    value = cfg.n_heads * cfg.v_head_dim
    assert kept[False] - kept[True] >= 3 * 4 * tokens * (query_and_key + value)
    assert torch.equal(results[False][0], results[True][0])
    assert all(torch.equal(grad, results[True][1][name]) for name, grad in results[False][1].items())


def test_recomputed_up_projections_run_beside_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, options: whole(module, backend="eager"))  # no kernels
    cfg = mla_config()
    cfg.n_layers = 1  # dense
    plain, compiled = tiny_model(cfg, precision=fp8()), meta_model(cfg)
    parallelize(compiled, None, fp8(), compile=True)
    compiled.to_empty(device=CPU).load_state_dict(plain.state_dict())
    losses, grads = step(plain)
    compiled_losses, compiled_grads = step(compiled)
    assert torch.equal(losses.total, compiled_losses.total)
    assert all(torch.equal(grad, compiled_grads[name]) for name, grad in grads.items())


class Sharded(NamedTuple):
    """What a step with sharded BF16 parameters gave to gates and experts, and how many inputs and gradients were
    quantized that others may share."""

    gate_inputs: set[torch.dtype]
    row_weights: set[torch.dtype]
    inputs: int
    gradients: int


def sharded(expert: int) -> Sharded:
    from moefoundry.mesh import build_meshes, resolve_degrees

    model = meta_model(tiny_config())
    meshes = build_meshes(resolve_degrees(MeshConfig(1, 2, expert), 2), "cpu")
    parallelize(model, meshes, PrecisionConfig(compute=Compute.bf16, fp8=Fp8Config(Fp8Recipe.deepseek_v3)))
    materialize(model, CPU, seed=0)
    gate_inputs, row_weights, quantized = set(), set(), []
    for layer in moe_layers(model):
        layer.router.register_forward_pre_hook(lambda _, args: gate_inputs.add(args[0].dtype))
        layer.experts.register_forward_pre_hook(lambda _, args: row_weights.add(args[1].dtype))

    def counting(x: Tensor, *args: object, **options: object) -> QuantizedTensor:
        quantized.append(x)
        return quantize(x, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moefoundry.ops.fp8.quantization.quantize", counting)
        total = model(batch(), batch()).total
        inputs = len(quantized)
        total.backward()
    return Sharded(gate_inputs, row_weights, inputs, len(quantized) - inputs)


@pytest.mark.parametrize("expert", [1, 2])
def test_units_of_fsdp_round_no_weights_of_rows_and_quantize_no_input_twice(expert: int) -> None:
    result = run_distributed(sharded, 2, expert)[0]
    assert result.gate_inputs == {torch.bfloat16}
    assert result.row_weights == {torch.float32}
    assert result.inputs == 3 * 3, "of each block: attention's input and output, its FFN's input"
    assert result.gradients == 3, "of each FFN's output"


def moe_block(fp8_recipe: Fp8Recipe | None) -> tuple[nn.Module, int, int]:
    """Norm and MoE layer in BF16, at DeepSeek-V3's proportions: D : F = 7 : 2, 8 experts a token and a shared one."""
    width, hidden = 7 * 128, 2 * 128
    moe = MoEConfig(num_experts=16, top_k=8, expert_hidden_size=hidden, num_shared_experts=1)
    torch.manual_seed(0)
    block = nn.Sequential(RMSNorm(width, 1e-6), MoELayer(width, moe)).to(torch.bfloat16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    apply_precision(block, PrecisionConfig(fp8=Fp8Config(fp8_recipe)))
    return block, width, hidden


def test_an_moe_block_keeps_at_most_55_percent_of_bf16_for_backward() -> None:
    tokens, kept = 64, {}
    for fp8_recipe in (None, Fp8Recipe.deepseek_v3):
        block, width, hidden = moe_block(fp8_recipe)
        with Kept(*block.parameters()) as saved:
            block(torch.randn(1, tokens, width, dtype=torch.bfloat16).requires_grad_())
        kept[fp8_recipe] = saved.nbytes
    products = tokens * (8 + 1) * hidden * 2  # SwiGLU's: BF16 could compute them again too
    assert kept[Fp8Recipe.deepseek_v3] <= 0.55 * (kept[None] - products)
