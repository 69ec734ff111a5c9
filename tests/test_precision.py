"""Emulated BF16: which products are emulated, to which bits, and what stays as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.config import Compute, MoEConfig, PrecisionConfig
from moefoundry.model.output_head import OutputHead
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.router import Router
from moefoundry.ops.grouped_linear import grouped_linear
from moefoundry.ops.permute import order_by_expert
from moefoundry.precision import EmulatedLinear, apply_precision, full_precision_modules, mixed_precision
from tests.model.tiny import batch, gradients, meta_model, tiny_config, tiny_model

EMULATED = PrecisionConfig(compute=Compute.bf16_emulated)


def bf16(x: Tensor) -> Tensor:
    return x.detach().to(torch.bfloat16).to(x.dtype)


def emulated(module: nn.Module) -> nn.Module:
    apply_precision(module, EMULATED)
    return module


def linear_case() -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer, its input and the gradient of its output."""
    torch.manual_seed(0)
    return nn.Linear(24, 16), torch.randn(5, 24, requires_grad=True), torch.randn(5, 16)


def is_bf16(x: Tensor) -> bool:
    return torch.equal(x, bf16(x))


def test_linear_multiplies_rounded_operands_bit_for_bit_in_all_three_products() -> None:
    linear, x, incoming = linear_case()
    out = emulated(nn.Sequential(linear))(x)
    out.backward(incoming)
    exact = nn.Linear(24, 16)
    exact.load_state_dict({"weight": bf16(linear.weight), "bias": linear.bias.detach()})
    x_ = bf16(x).requires_grad_()
    expected = exact(x_)
    expected.backward(bf16(incoming))
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, x_.grad)
    assert torch.equal(linear.weight.grad, exact.weight.grad)


def test_linear_is_near_a_real_bf16_product() -> None:
    linear, x, incoming = linear_case()
    out = emulated(nn.Sequential(linear))(x)
    out.backward(incoming)
    real, x_ = nn.Linear(24, 16), x.detach().to(torch.bfloat16).requires_grad_()
    real.load_state_dict(linear.state_dict())
    real.to(torch.bfloat16)
    real_out = real(x_)
    real_out.backward(incoming.to(torch.bfloat16))
    for ours, theirs in ((out, real_out), (x.grad, x_.grad), (linear.weight.grad, real.weight.grad)):
        # Real BF16 also rounds its result (and the bias): half an ulp each.
        torch.testing.assert_close(ours, theirs.float(), rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_experts_multiply_rounded_operands_bit_for_bit(backend: str) -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(8, MoEConfig(num_experts=3, expert_hidden_size=4, backend=backend))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    rows, counts = torch.randn(7, 8), torch.tensor([2, 0, 5])
    order = order_by_expert(torch.tensor([0, 0, 2, 2, 2, 2, 2]).unsqueeze(1), 3)
    product = experts.product
    gate, up, down = (bf16(p) for p in (experts.gate_proj, experts.up_proj, experts.down_proj))
    hidden = F.silu(product(bf16(rows), gate, counts)) * product(bf16(rows), up, counts)
    expected = product(bf16(hidden), down, counts)
    assert torch.equal(emulated(experts)(rows, torch.ones(7, 1), order), expected)


def test_every_linear_but_the_gates_is_emulated() -> None:
    model = emulated(meta_model(tiny_config()))
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == [f"layers.{layer}.ffn.router.gate" for layer in (1, 2)]
    emulated_names = {name for name, module in model.named_modules() if isinstance(module, EmulatedLinear)}
    attention = {f"layers.{i}.attention.{p}_proj" for i in range(3) for p in "qkvo"}
    dense = {f"layers.0.ffn.{p}_proj" for p in ("gate", "up", "down")}
    shared = {f"layers.{i}.ffn.shared_experts.{p}_proj" for i in (1, 2) for p in ("gate", "up", "down")}
    assert emulated_names == attention | dense | shared
    assert model.lm_head.operand_dtype == torch.bfloat16


def test_every_product_of_a_step_but_the_gates_takes_rounded_operands() -> None:
    """Operands are watched below autograd, so that products of the backward pass are seen too."""
    exact: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in {"mm", "addmm", "addmm_", "_grouped_mm"}:
                operands = args[1:3] if name.startswith("addmm") else args[:2]
                if not all(is_bf16(x) for x in operands):
                    exact.append(tuple(sorted({*operands[0].shape, *operands[1].shape})))
            return func(*args, **(kwargs or {}))

    cfg = tiny_config(n_layers=2)
    model, ids = tiny_model(cfg, precision=EMULATED), batch()
    with Watch():
        model(ids, ids).lm.backward()
    gate = (cfg.moe.num_experts, ids.numel(), cfg.d_model)
    assert exact == [tuple(sorted(set(gate)))] * 3


def test_gate_is_untouched() -> None:
    plain, ours = tiny_model(tiny_config()), tiny_model(tiny_config(), precision=EMULATED)
    x_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    for ours_value, plain_value in zip(*(model.layers[1].ffn.router(x_TD)[:4] for model in (ours, plain)), strict=True):
        assert torch.equal(ours_value, plain_value)


def test_names_values_and_dtypes_of_parameters_are_unchanged() -> None:
    plain, ours = tiny_model(tiny_config()), tiny_model(tiny_config(), precision=EMULATED)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, plain.state_dict()[name])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_give_the_loss_of_the_training_step(tied: bool) -> None:
    model = tiny_model(tiny_config(tie_embeddings=tied), precision=EMULATED)
    logits = model(batch())[:, :-1].flatten(0, 1)
    torch.testing.assert_close(model(batch(), batch()).lm, F.cross_entropy(logits, batch()[:, 1:].flatten()))


def test_output_head_rounds_its_operands_in_both_uses() -> None:
    torch.manual_seed(0)
    head, hidden, targets = OutputHead(8, 13, bias=False), torch.randn(2, 5, 8), torch.randint(0, 13, (2, 5))
    expected = bf16(hidden) @ bf16(head.weight).T
    head = emulated(nn.Sequential(head))[0]
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=1e-6)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(head(hidden, targets), loss)


def test_emulation_changes_the_loss_a_little() -> None:
    plain, ours = (tiny_model(tiny_config(), precision=p) for p in (PrecisionConfig(), EMULATED))
    exact, rounded = (model(batch(), batch()).total for model in (plain, ours))
    assert exact != rounded
    torch.testing.assert_close(exact, rounded, rtol=2e-2, atol=0)
    rounded.backward()
    assert gradients(ours).keys() == dict(ours.named_parameters()).keys()


@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
def test_other_policies_leave_the_model_alone(compute: Compute) -> None:
    model = meta_model(tiny_config())
    apply_precision(model, PrecisionConfig(compute=compute))
    assert not [module for module in model.modules() if isinstance(module, EmulatedLinear)]
    assert model.lm_head.operand_dtype is None
    assert all(m.product is grouped_linear for m in model.modules() if isinstance(m, GroupedExperts))


@pytest.mark.parametrize("compute", Compute)
def test_fsdp_casts_for_bf16_alone_and_spares_the_routers(compute: Compute) -> None:
    cfg, model = PrecisionConfig(compute=compute), meta_model(tiny_config())
    policy, spared = mixed_precision(cfg), full_precision_modules(model, cfg)
    if compute == Compute.bf16:
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert spared == [module for module in model.modules() if isinstance(module, Router)]
    else:
        assert policy.param_dtype is policy.reduce_dtype is None
        assert not spared
