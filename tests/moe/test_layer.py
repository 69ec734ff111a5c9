"""The MoE layer against a token-by-token float64 implementation written here, and against transformers' blocks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from moefoundry.config import AuxLossScope, BalanceConfig, MoEConfig, RouterConfig, ScoreFunction, UserError
from moefoundry.moe.balance import max_violation
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.expert_mixture import expert_mixture
from moefoundry.ops.swiglu import PLAIN, Activation

B, S, D, F, E = 3, 5, 16, 12, 6


def moe_config(backend: str, top_k: int = 2, shared: int = 1, scope: str = "sequence", **router: object) -> MoEConfig:
    return MoEConfig(
        num_experts=E,
        top_k=top_k,
        expert_hidden_size=F,
        num_shared_experts=shared,
        router=RouterConfig(**router),
        balance=BalanceConfig(aux_loss_scope=AuxLossScope(scope)),
        backend=backend,
    )


def layer(cfg: MoEConfig, dtype: torch.dtype = torch.float32, activation: Activation = PLAIN) -> MoELayer:
    module = MoELayer(D, cfg, activation)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return module.to(dtype)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def send_all_to(module: MoELayer, expert: int) -> None:
    """A gate that scores one expert far above the others for every token with a positive first feature."""
    with torch.no_grad():
        module.router.gate.weight.mul_(0.1)
        module.router.gate.weight[expert, 0] = 5.0


def naive_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = gate @ x
    return down @ (hidden / (1 + (-hidden).exp()) * (up @ x))


def naive_moe(x_BSD: Tensor, p: dict[str, Tensor], cfg: MoEConfig) -> Tensor:
    """One token at a time; parameters by their names in the layer."""
    out = []
    for x in x_BSD.reshape(-1, D):
        scores = (p["router.gate.weight"] @ x).exp()
        scores = scores / scores.sum()
        best = sorted(range(E), key=lambda e: -scores[e].item())[: cfg.top_k]
        divisor = sum(scores[e] for e in best) if cfg.router.normalize_topk else 1.0
        y = torch.zeros(D, dtype=x.dtype)
        for e in best:
            weights = (p[f"experts.{name}_proj"][e] for name in ("gate", "up", "down"))
            y = y + cfg.router.scale * scores[e] / divisor * naive_swiglu(x, *weights)
        if cfg.num_shared_experts:
            y = y + naive_swiglu(x, *(p[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
        out.append(y)
    return torch.stack(out).view_as(x_BSD)


def naive_gpt_oss(x_BSD: Tensor, p: dict[str, Tensor], cfg: MoEConfig) -> Tensor:
    """One token at a time: biases of gate and experts, and the clamped activation :data:`CLAMPED`."""

    def ffn(x: Tensor, prefix: str, e: int | None = None) -> Tensor:
        def project(x: Tensor, name: str) -> Tensor:
            if e is None:
                return p[f"{prefix}{name}_proj.weight"] @ x
            return p[f"{prefix}{name}_proj"][e] @ x + p[f"{prefix}{name}_proj_bias"][e]

        gate, up = project(x, "gate").clamp(max=0.5), project(x, "up").clamp(-0.5, 0.5)
        return project(gate / (1 + (-1.7 * gate).exp()) * (up + 1), "down")

    out = []
    for x in x_BSD.reshape(-1, D):
        logits, chosen = (p["router.gate.weight"] @ x + p["router.gate.bias"]).topk(cfg.top_k)
        y = ffn(x, "shared_experts.")
        for weight, e in zip(logits.softmax(0), chosen.tolist(), strict=True):
            y = y + weight * ffn(x, "experts.", e)
        out.append(y)
    return torch.stack(out).view_as(x_BSD)


CLAMPED = Activation(alpha=1.7, limit=0.5, offset=1.0)


def assert_equals_naive(
    module: MoELayer, cfg: MoEConfig, x_BSD: Tensor, atol: float, naive: Callable[..., Tensor] = naive_moe
) -> None:
    """Output, input gradient and every parameter's gradient."""
    incoming = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(2), dtype=x_BSD.dtype)
    exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    exact_x = x_BSD.detach().double().requires_grad_()
    out, expected = module(x_BSD)[0], naive(exact_x, exact, cfg)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    got = torch.autograd.grad(out, [x_BSD, *module.parameters()], incoming)
    want = torch.autograd.grad(
        expected, [exact_x, *exact.values()], incoming.double(), allow_unused=True, materialize_grads=True
    )
    for name, g, w in zip(["x", *exact], got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=atol * 10, msg=lambda text, name=name: f"{name}: {text}")


CONFIGS = {
    "default": {},
    "one_choice": {"top_k": 1},
    "every_expert": {"top_k": E},
    "no_shared": {"shared": 0},
    "two_shared": {"shared": 2},
    "not_normalized": {"normalize_topk": False, "top_k": 3},
    "scaled": {"scale": 2.5},
}
BACKENDS = [
    pytest.param("loop", torch.float64, 1e-11, id="loop_float64"),
    pytest.param("loop", torch.float32, 1e-5, id="loop_fp32"),
    pytest.param("grouped_mm", torch.float32, 1e-5, id="grouped_mm_fp32"),
]


@pytest.mark.parametrize(("backend", "dtype", "atol"), BACKENDS)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_output_and_all_gradients_equal_token_by_token_float64(
    backend: str, dtype: torch.dtype, atol: float, options: dict
) -> None:
    cfg = moe_config(backend, **options)
    assert_equals_naive(layer(cfg, dtype), cfg, tokens(dtype), atol)


@pytest.mark.parametrize(
    ("backend", "dtype", "atol"), [*BACKENDS, pytest.param("auto", torch.float32, 1e-5, id="auto")]
)
def test_biases_and_a_clamped_activation(backend: str, dtype: torch.dtype, atol: float) -> None:
    cfg = moe_config(backend, top_k=3, gate_bias=True)
    cfg.projection_bias = True
    module = layer(cfg, dtype, CLAMPED)
    assert_equals_naive(module, cfg, tokens(dtype), atol, naive_gpt_oss)


def test_a_backend_that_computes_plain_swiglu_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("moefoundry.moe.mixture.RowMixture.takes_hidden")
    cfg = moe_config("loop")
    MoELayer(D, cfg)
    with pytest.raises(
        UserError, match=r"^model.moe.backend: loop does not compute model.swiglu; use model.moe.backen"
    ):
        MoELayer(D, cfg, CLAMPED)
    cfg.projection_bias = True
    with pytest.raises(UserError, match=r"^model.moe.backend: loop does not compute model.moe.projection_bias; use"):
        MoELayer(D, cfg)


@pytest.mark.parametrize(("backend", "dtype", "atol"), BACKENDS)
@pytest.mark.parametrize("expert", [0, 3, E - 1])
def test_all_tokens_on_one_expert(backend: str, dtype: torch.dtype, atol: float, expert: int) -> None:
    cfg = moe_config(backend, top_k=1)
    module = layer(cfg, dtype)
    send_all_to(module, expert)
    x_BSD = tokens(dtype).detach().abs().requires_grad_()
    x_BSD.data[..., 0] += 1
    assert_equals_naive(module, cfg, x_BSD, atol)
    stats = module(x_BSD)[1]
    assert stats.tokens_per_expert.tolist() == [B * S if e == expert else 0 for e in range(E)]


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_a_single_token(backend: str) -> None:
    cfg = moe_config(backend, top_k=3)
    assert_equals_naive(layer(cfg), cfg, tokens()[:1, :1].detach().requires_grad_(), 1e-5)


def test_bfloat16_is_near_float64() -> None:
    cfg = moe_config("grouped_mm", top_k=E)  # every expert, so that rounding cannot change the choice
    cfg.expert_hidden_size = 16
    module = layer(cfg, torch.bfloat16)
    x_BSD = tokens(torch.bfloat16)
    expected = naive_moe(x_BSD.detach().double(), {n: p.detach().double() for n, p in module.named_parameters()}, cfg)
    out = module(x_BSD)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2**-6 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_a_token_does_not_depend_on_the_others(backend: str) -> None:
    module, x_BSD = layer(moe_config(backend)), tokens().detach()
    out, _ = module(x_BSD)
    alone, _ = module(x_BSD[1:2, 2:3])
    torch.testing.assert_close(alone[0, 0], out[1, 2], rtol=0, atol=1e-5)
    others = torch.randn_like(x_BSD)
    others[1, 2] = x_BSD[1, 2]
    torch.testing.assert_close(module(others)[0][1, 2], out[1, 2], rtol=0, atol=1e-5)


def test_input_gradient_of_one_token_stays_with_that_token() -> None:
    x_BSD = tokens()
    layer(moe_config("grouped_mm"))(x_BSD)[0][1, 2].sum().backward()
    assert {(b, s) for b, s, _ in x_BSD.grad.nonzero().tolist()} == {(1, 2)}


@pytest.mark.parametrize("split", [[3], [1, 2], [2, 1], [1, 1, 1]], ids=str)
def test_losses_and_their_gradients_do_not_depend_on_micro_batching(split: list[int]) -> None:
    module = layer(moe_config("loop"), torch.float64)
    x_BSD = tokens(torch.float64).detach()

    def losses(part_BSD: Tensor) -> Tensor:
        out, stats = module(part_BSD)
        return torch.stack([stats.balance_loss, stats.z_loss, out.square().mean()])

    whole, parts = losses(x_BSD), sum(losses(part) * len(part) / B for part in x_BSD.split(split))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    for index in range(3):
        grads = [torch.autograd.grad(x[index], module.router.gate.weight, retain_graph=True) for x in (parts, whole)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_scopes_differ_where_sequences_do() -> None:
    x_BSD = tokens().detach()
    by_sequence, by_batch = (
        layer(moe_config("loop", scope=scope))(x_BSD)[1].balance_loss for scope in ("sequence", "micro_batch")
    )
    assert by_sequence != by_batch
    each = [layer(moe_config("loop", scope="micro_batch"))(x[None])[1].balance_loss for x in x_BSD]
    torch.testing.assert_close(by_sequence, torch.stack(each).mean())


def test_auxiliary_losses_reach_the_gate_and_the_input_but_no_expert() -> None:
    module, x_BSD = layer(moe_config("grouped_mm")), tokens()
    stats = module(x_BSD)[1]
    (stats.balance_loss + stats.z_loss).backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"router.gate.weight"}
    assert x_BSD.grad.abs().sum() > 0


def test_statistics_count_every_choice_once() -> None:
    stats = layer(moe_config("grouped_mm", top_k=3))(tokens())[1]
    assert stats.tokens_per_expert.sum() == B * S * 3
    assert not stats.router_entropy.requires_grad


def test_two_runs_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        module, x_BSD = layer(moe_config("grouped_mm")), tokens()
        out = module(x_BSD)[0]
        out.square().sum().backward()
        return [out, x_BSD.grad, *(p.grad for p in module.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def transformers_block(name: str, top_k: int, module: MoELayer) -> nn.Module:
    """transformers' block of these sizes with the weights of ``module``."""
    sizes = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": top_k}
    if name == "mixtral":
        block, names = MixtralSparseMoeBlock(MixtralConfig(num_local_experts=E, **sizes)), ("w1", "w3", "w2")
    else:
        cfg = OlmoeConfig(num_experts=E, norm_topk_prob=name == "olmoe_normalized", **sizes)
        block, names = OlmoeSparseMoeBlock(cfg), ("gate_proj", "up_proj", "down_proj")
    experts = module.experts
    with torch.no_grad():
        block.gate.weight.copy_(module.router.gate.weight)
        for e, expert in enumerate(block.experts):
            for theirs, ours in zip(names, (experts.gate_proj, experts.up_proj, experts.down_proj), strict=True):
                getattr(expert, theirs).weight.copy_(ours[e])
    return block


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "olmoe_normalized"])
def test_layer_equals_transformers_block(name: str, top_k: int, backend: str) -> None:
    module = layer(moe_config(backend, top_k=top_k, shared=0, normalize_topk=name != "olmoe"))
    block = transformers_block(name, top_k, module)
    rows: list[int] = [0] * E
    for e, expert in enumerate(block.experts):
        expert.register_forward_hook(lambda _, args, __, e=e: rows.__setitem__(e, args[0].shape[0]))
    ours, theirs = tokens(), tokens()
    (out, stats), (expected, _) = module(ours), block(theirs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert stats.tokens_per_expert.tolist() == rows
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(module.router.gate.weight.grad, block.gate.weight.grad, rtol=0, atol=5e-5)


def test_fused_cpu_function_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.config import MoEConfig

    torch.manual_seed(0)
    module = MoELayer(32, MoEConfig(num_experts=8, top_k=3, expert_hidden_size=16, num_shared_experts=1))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, 32)
    calls: list[Tensor] = []
    monkeypatch.setattr(
        "moefoundry.moe.mixture.expert_mixture", lambda *args: calls.append(args[0]) or expert_mixture(*args)
    )
    runs = []
    for threshold in (2**60, 0):
        assert not calls
        monkeypatch.setattr("moefoundry.ops.expert_mixture.PAYS_FROM_BYTES", threshold)
        module.zero_grad()
        out, stats = module(x)
        (out.square().sum() + stats.balance_loss).backward()
        runs.append([out.detach(), stats.tokens_per_expert, *(p.grad.clone() for p in module.parameters())])
    assert len(calls) == 1
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_on_a_gpu_it_computes_what_it_computes_on_a_cpu(dtype: torch.dtype, tolerance: float) -> None:
    from moefoundry.config import MoEConfig

    torch.manual_seed(0)
    on_cpu = MoELayer(64, MoEConfig(num_experts=8, top_k=2, expert_hidden_size=32, num_shared_experts=1))
    for parameter in on_cpu.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    on_gpu = (
        MoELayer(64, MoEConfig(num_experts=8, top_k=2, expert_hidden_size=32, num_shared_experts=1)).cuda().to(dtype)
    )
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_cpu.load_state_dict({name: weight.float().cpu() for name, weight in on_gpu.state_dict().items()})
    x = torch.randn(2, 128, 64).to(dtype)
    expected = on_cpu(x.float())[0]
    expected.square().sum().backward()
    out = on_gpu(x.cuda())[0]
    out.square().sum().backward()
    torch.testing.assert_close(out.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    for (name, ours), theirs in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        error = (ours.grad.float().cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert error < tolerance, name


@pytest.mark.parametrize("shape", [(0, S), (1, 0), (2, 0), (0, 0)])
@pytest.mark.parametrize("scope", AuxLossScope)
@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_no_tokens_have_no_loss_and_gradients_of_0(
    shape: tuple[int, int], scope: AuxLossScope, capacity: float | None, score_function: str
) -> None:
    cfg = moe_config(
        "grouped_mm", scope=scope, score_function=ScoreFunction(score_function), num_groups=3, top_k_groups=2
    )
    cfg.capacity_factor = capacity
    module = layer(cfg)
    x_BSD = torch.empty(*shape, D).requires_grad_()
    out_BSD, stats = module(x_BSD)
    assert out_BSD.shape == x_BSD.shape
    assert stats.losses is None
    for name, value in stats._replace(losses=torch.zeros(0))._asdict().items():
        assert torch.equal(value, torch.zeros_like(value)), name
    (out_BSD.sum() + stats.balance_loss + stats.z_loss + stats.mean_probs.sum()).backward()
    assert x_BSD.grad.shape == x_BSD.shape
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    assert module.router.gate.weight.grad is not None


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_an_empty_micro_batch_beside_another_changes_nothing(backend: str) -> None:
    """As ranks and micro-batches are weighted: by their tokens."""
    module = layer(moe_config(backend))
    _, full = module(tokens())
    _, empty = module(torch.empty(0, S, D))
    for name in ("balance_loss", "z_loss", "router_entropy"):
        mixed = (getattr(full, name) * B * S + getattr(empty, name) * 0) / (B * S)
        torch.testing.assert_close(mixed, getattr(full, name))
    assert max_violation(empty.tokens_per_expert) == 0
