"""A sharded model is the single process's model: the same weights, and the same training to rounding."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    AdamWConfig,
    BalanceConfig,
    Fp8Config,
    Fp8Recipe,
    Gather,
    GqaConfig,
    InitConfig,
    LinearAttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MultipliersConfig,
    NormConfig,
    NormPosition,
    PrecisionConfig,
    QkNorm,
    Reduce,
    RouterConfig,
    SwigluConfig,
)
from moefoundry.retry import can_forget
from tests.distributed import run_distributed


def meshes_of(world_size: int) -> list[tuple[int, int, int, int | None]]:
    """Every valid (replicate, shard, expert, ranks per node) on one node, then those where experts span nodes."""
    degrees = [n for n in range(1, world_size + 1) if world_size % n == 0]
    meshes = [(world_size // shard, shard, expert) for shard in degrees for expert in degrees if shard % expert == 0]
    spanning = [(*mesh, nodes) for mesh in meshes for nodes in degrees[1:] if mesh[2] > nodes]
    return [(*mesh, None) for mesh in meshes] + spanning


MESHES = [mesh for world_size in (1, 2, 4) for mesh in meshes_of(world_size)]
SLOW_MESHES = [
    *meshes_of(8),
    (1, 2, 1, None),
    (1, 2, 2, None),
    (2, 1, 1, None),
    (2, 2, 1, None),
    (4, 1, 1, None),
    (1, 4, 1, None),
    (1, 4, 2, None),
    (1, 4, 4, None),
    (1, 4, 4, 2),
]
"""Those of 8 ranks, and of 2 and 4 those whose parts others have, too."""
STEPS = 2
SEQUENCES, LENGTH = 16, 16
SEED = 5
DRAWN_BYTES = 3 * 16 * 32 * 4  # weights are drawn slice by slice; the largest slice is one expert's matrix


class Mode(NamedTuple):
    """How a step is computed; none of it but FP8 and another model may change what is computed."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32
    fp8: Fp8Recipe | None = None
    linear: bool = False
    chunks: int = 1
    gather: Gather = Gather.each_pass
    reduce: Reduce = Reduce.each_micro_batch


PLAIN = Mode()
FP32_MODES = [Mode(checkpointing, count) for checkpointing in ActivationCheckpointing for count in (1, 4)]
FLOAT64 = Mode(ActivationCheckpointing.full, 4, torch.float64)
LINEAR = Mode(ActivationCheckpointing.selective, 4, torch.float64, linear=True)
ONCE: list[dict[str, Any]] = [
    {"gather": Gather.each_step},
    {"reduce": Reduce.each_step},
    {"gather": Gather.each_step, "reduce": Reduce.each_step, "chunks": 2},
]
FEW_MODES = [
    PLAIN,
    Mode(ActivationCheckpointing.selective, 4, chunks=2),
    Mode(ActivationCheckpointing.full, 1, chunks=3),
    FLOAT64._replace(chunks=2),
    LINEAR,
    LINEAR._replace(activation_checkpointing=ActivationCheckpointing.full),
    *(FLOAT64._replace(**change) for change in ONCE),
]
FOUR_RANKS_MODES = [
    mode._replace(micro_batches=2) for mode in (Mode(ActivationCheckpointing.selective, chunks=2), FLOAT64, LINEAR)
]
ALL_MODES = [*FP32_MODES, FLOAT64, LINEAR, *(FP32_MODES[1]._replace(**change) for change in ONCE)]
EIGHT_RANKS_MODES = [mode._replace(micro_batches=min(mode.micro_batches, 2)) for mode in ALL_MODES]


class Outcome(NamedTuple):
    """What a training run left: per step the loss of the global batch and the gradient norm, then all parameters."""

    losses: Tensor
    grad_norms: Tensor
    parameters: dict[str, Tensor]


def experts_for(expert_degree: int) -> int:
    """6 where they divide, which two and four ranks shard unevenly (one rank of four holds none)."""
    return 6 if 6 % expert_degree == 0 else 8


def with_linear_attention(cfg: ModelConfig) -> ModelConfig:
    """Linear attention, whose 6 decays four ranks do not divide, then gated attention; norms about 0."""
    linear = LinearAttentionConfig(layers=[0], n_key_heads=2, n_value_heads=6, key_head_dim=4, value_head_dim=8)
    attention = replace(cfg.attention, output_gate=True)
    return replace(cfg, norm=NormConfig(zero_centered=True), attention=attention, linear_attention=linear)


def model_config(num_experts: int, dtype: torch.dtype = torch.float32, chunks: int = 1) -> ModelConfig:
    """A small model; four ranks do not divide its 67 tokens."""
    return ModelConfig(
        vocab_size=67,
        d_model=32,
        n_layers=2,
        n_dense_layers=1,
        ffn_hidden_size=48,
        init=InitConfig(std=0.1),
        swiglu=SwigluConfig(alpha=1.2, limit=1.0, offset=0.5),
        norm=NormConfig(position=NormPosition.both, bias=True),
        head_bias=True,
        attention=GqaConfig(
            n_heads=4,
            n_kv_heads=2,
            rotary_fraction=0.5,
            softmax_scale=0.3,
            qk_norm=QkNorm.head_after_rope,
            sinks=True,
            sliding_window=5,
            sliding_window_layers=[1],
            sliding_window_rope_theta=50.0,
            unrotated_layers=[0],
        ),
        multipliers=MultipliersConfig(embedding=2.0, residual=0.5, logits_divisor=1.5),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=2,
            expert_hidden_size=16,
            num_shared_experts=1,
            shared_expert_gate=True,
            projection_bias=True,
            router=RouterConfig(gate_bias=True),
            balance=BalanceConfig(aux_loss_weight=0.1, z_loss_weight=0.01),
            backend="loop" if dtype == torch.float64 else "grouped_mm",
            dispatch_chunks=chunks,
        ),
    )


def build(mesh_sizes: tuple[int, int, int, int | None] | None, num_experts: int, mode: Mode = PLAIN) -> torch.nn.Module:
    """The model on this rank; None leaves it unsharded."""
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import MoETransformer
    from moefoundry.parallel import materialize, parallelize

    mesh = None
    if mesh_sizes is not None:
        config = MeshConfig(*mesh_sizes, mode.gather, mode.reduce)
        mesh = build_meshes(resolve_degrees(config, mesh_sizes[0] * mesh_sizes[1]), "cpu")
    cfg = model_config(num_experts, mode.dtype, mode.chunks)
    with torch.device("meta"):
        model = MoETransformer(with_linear_attention(cfg) if mode.linear else cfg).to(mode.dtype)
    parallelize(model, mesh, PrecisionConfig(fp8=Fp8Config(mode.fp8)), mode.activation_checkpointing)
    materialize(model, "cpu", SEED)
    return model


def full(tensor: Tensor) -> Tensor:
    """A copy of a whole tensor, of which this rank may hold a part."""
    from torch.distributed.tensor import DTensor

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def full_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def train(mesh_sizes: tuple[int, int, int, int | None] | None, num_experts: int, mode: Mode) -> Outcome:
    """AdamW steps on fixed batches, of which this rank takes its share."""
    import torch.distributed as dist

    from moefoundry.callbacks.health import global_norm
    from moefoundry.optim import build_adamw
    from moefoundry.parallel import begin_micro_batch

    rank, ranks = (0, 1) if mesh_sizes is None else (dist.get_rank(), dist.get_world_size())
    model = build(mesh_sizes, num_experts, mode)
    optimizer = build_adamw(model, AdamWConfig(lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    losses, grad_norms = [], []
    for _ in range(STEPS):
        tokens = torch.randint(67, (SEQUENCES, LENGTH), generator=generator).chunk(ranks)[rank]
        loss = torch.zeros((), dtype=mode.dtype)
        for index, micro_batch in enumerate(tokens.chunk(mode.micro_batches), start=1):
            begin_micro_batch(model, index == mode.micro_batches)
            micro_loss = model(micro_batch, micro_batch).total / mode.micro_batches
            micro_loss.backward()
            loss += micro_loss.detach()
        if ranks > 1:
            dist.all_reduce(loss)
        grad_norms.append(global_norm([parameter.grad for parameter in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss / ranks)
    return Outcome(torch.stack(losses), torch.stack(grad_norms), full_parameters(model))


class Held(NamedTuple):
    """Bytes on one rank, and of the whole model."""

    parameters: int
    moments: int
    whole: int


def held_after_a_step(mesh_sizes: tuple[int, int, int, int | None], num_experts: int) -> Held:
    from moefoundry.optim import build_adamw

    model = build(mesh_sizes, num_experts)
    optimizer = build_adamw(model, AdamWConfig(lr=4e-3))
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    model(tokens, tokens).total.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return Held(
        parameters=sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()),
        moments=sum(moment.to_local().untyped_storage().nbytes() for moment in moments),
        whole=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def peak_bytes_of_building(mesh_sizes: tuple[int, int, int, int | None] | None, num_experts: int) -> int:
    """The most that was allocated at once while the model was built and given its weights."""
    from tests.memory import PeakMemory

    with PeakMemory() as memory:
        build(mesh_sizes, num_experts)
    return memory.peak


class Rank(NamedTuple):
    """All that the tests want to know of one rank."""

    initial_weights: dict[str, Tensor]
    peak: int
    held: Held | None
    outcomes: list[Outcome]


def observe(mesh_sizes: tuple[int, int, int, int | None] | None, num_experts: int, modes: list[Mode]) -> Rank:
    peak = peak_bytes_of_building(mesh_sizes, num_experts)
    initial_weights = full_parameters(build(mesh_sizes, num_experts))
    held = held_after_a_step(mesh_sizes, num_experts) if mesh_sizes else None
    return Rank(initial_weights, peak, held, [train(mesh_sizes, num_experts, mode) for mode in modes])


class Sharded(NamedTuple):
    replicate: int
    shard: int
    num_experts: int
    modes: list[Mode]
    ranks: list[Rank]


@pytest.fixture(
    scope="module",
    params=[
        *(mesh for mesh in MESHES if mesh not in SLOW_MESHES),
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW_MESHES),
    ],
    ids=lambda mesh: "replicate{}-shard{}-expert{}".format(*mesh) + ("-nodes" if mesh[3] else ""),
)
def sharded(request: pytest.FixtureRequest) -> Sharded:
    """One world, in which everything is tried."""
    replicate, shard, expert, _ = request.param
    num_experts = experts_for(expert)
    slow_modes = EIGHT_RANKS_MODES if replicate * shard == 8 else ALL_MODES
    few_modes = FOUR_RANKS_MODES if replicate * shard == 4 else FEW_MODES
    modes = slow_modes if request.param in SLOW_MESHES else few_modes
    ranks = run_distributed(observe, replicate * shard, request.param, num_experts, modes)
    return Sharded(replicate, shard, num_experts, modes, ranks)


@cache
def single_process(num_experts: int = 6) -> Rank:
    """What every mesh must equal: no sharding, no checkpointing, one micro-batch."""
    wide = Mode(dtype=torch.float64)
    return run_distributed(observe, 1, None, num_experts, [PLAIN, wide, wide._replace(linear=True)])[0]


def assert_same_training(outcome: Outcome, mode: Mode, num_experts: int = 6) -> None:
    in_float64 = mode.dtype == torch.float64
    expected = single_process(num_experts).outcomes[in_float64 + mode.linear]
    step_rtol, parameter_rtol = (1e-10, 1e-10) if in_float64 else (1e-6, 1e-5)
    for name in ("losses", "grad_norms"):
        error = (getattr(outcome, name) / getattr(expected, name) - 1).abs().max()
        assert error <= step_rtol, f"{mode} {name}: relative error {error:.1e}"
    assert outcome.parameters.keys() == expected.parameters.keys()
    for name, parameter in outcome.parameters.items():
        error = (parameter - expected.parameters[name]).norm() / expected.parameters[name].norm()
        assert error <= parameter_rtol, f"{mode} {name}: relative error {error:.1e}"


def test_initial_weights_do_not_depend_on_the_mesh(sharded: Sharded) -> None:
    expected = single_process(sharded.num_experts).initial_weights
    for rank in sharded.ranks:
        assert rank.initial_weights.keys() == expected.keys()
        for name, weight in rank.initial_weights.items():
            assert torch.equal(weight, expected[name]), name


def test_sharded_training_equals_the_single_process(sharded: Sharded) -> None:
    for index, mode in enumerate(sharded.modes):
        first, *others = [rank.outcomes[index] for rank in sharded.ranks]
        assert_same_training(first, mode, sharded.num_experts)
        for other in others:  # one number on every rank
            assert torch.equal(other.losses, first.losses)
            assert torch.equal(other.grad_norms, first.grad_norms)


def test_each_rank_holds_its_shard_only(sharded: Sharded) -> None:
    for rank in sharded.ranks:
        assert rank.held is not None
        share = 1.3 * rank.held.whole / sharded.shard  # uneven shards are padded
        assert rank.held.parameters <= share
        assert rank.held.moments <= 2 * share
    assert sum(rank.held.parameters for rank in sharded.ranks) >= sharded.replicate * sharded.ranks[0].held.whole


def test_no_rank_ever_holds_the_whole_model(sharded: Sharded) -> None:
    for rank in sharded.ranks:
        assert rank.held is not None
        assert rank.held.parameters <= rank.peak <= rank.held.parameters + DRAWN_BYTES


def test_the_peak_of_a_single_process_is_the_whole_model() -> None:
    """The measure itself: it sees everything that is allocated."""
    peak, whole = single_process().peak, sum(4 * w.numel() for w in single_process().initial_weights.values())
    assert whole <= peak <= whole + DRAWN_BYTES


def test_checkpointing_and_micro_batches_do_not_change_training() -> None:
    for mode, outcome in zip(FP32_MODES, run_distributed(observe, 1, None, 6, FP32_MODES)[0].outcomes, strict=True):
        assert_same_training(outcome, mode)


def test_training_changes_every_parameter() -> None:
    """Without this, runs that all stand still would agree."""
    start, outcome = single_process().initial_weights, single_process().outcomes[0]
    assert outcome.losses[-1] != outcome.losses[0]
    for name, weight in start.items():
        assert not torch.equal(weight, outcome.parameters[name]), name


def gradients_of_a_step(mode: Mode, leaves_one_before: bool) -> dict[str, Tensor]:
    """Whole gradients of a step of two micro-batches; before, perhaps, a step is left behind its first."""
    from moefoundry.parallel import begin_micro_batch
    from moefoundry.retry import forget_step

    model = build((1, 2, 2, None), 6, mode)
    tokens = torch.randint(67, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    if leaves_one_before:
        begin_micro_batch(model, False)
        model(tokens, tokens).total.backward()
        forget_step(model)
    for last, micro_batch in enumerate(tokens.chunk(2)):
        begin_micro_batch(model, bool(last))
        model(micro_batch, micro_batch).total.backward()
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.skipif(not can_forget(), reason=f"torch {torch.__version__} cannot bring FSDP back")
@pytest.mark.parametrize("change", ONCE, ids=str)
def test_a_step_that_was_left_leaves_nothing(change: dict[str, Any]) -> None:
    mode = FLOAT64._replace(**change)
    fresh, again = (run_distributed(gradients_of_a_step, 2, mode, left)[0] for left in (False, True))
    for name, gradient in fresh.items():
        assert torch.equal(again[name], gradient), name
