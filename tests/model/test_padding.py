"""Padding is neither routed nor counted: a padded batch is its sequences by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moefoundry.config import (
    Compute,
    Fp8Config,
    Fp8Recipe,
    GqaConfig,
    LongRopeConfig,
    LossConfig,
    LossesConfig,
    MtpConfig,
    PrecisionConfig,
)
from moefoundry.foundry import ComposerMoECausalLM, CountTargets, FoundryMoECausalLM, count_tokens, with_counts
from moefoundry.model.losses import build_losses
from moefoundry.model.padding import RealTokens, count_at_depths
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.layer import MoELayer
from tests.distributed import run_distributed
from tests.model.tiny import EXPERTS, WIDTH, batch, gradients, tiny_config, tiny_model

LENGTHS = [[16], [3, 4], [9], [2, 1, 2], [8, 7], [4], [1, 5], [12]]  # documents of each row
ROWS = [batch(1, sum(documents), seed=row)[0] for row, documents in enumerate(LENGTHS)]
OF_ROWS = [torch.cat([torch.full((n,), i) for i, n in enumerate(documents)]) for documents in LENGTHS]
TOKENS = [len(row) for row in ROWS]
PADDED = with_counts(
    {
        "input_ids": pad_sequence(ROWS, batch_first=True, padding_value=7),
        "labels": pad_sequence(ROWS, batch_first=True, padding_value=-100),
        "sequence_id": pad_sequence(OF_ROWS, batch_first=True, padding_value=-1),
    }
)
Batch = dict[str, Any]


def config(backend: str = "loop", scope: str = "sequence", mtp: int = 0, masking: bool = False) -> Any:
    cfg = tiny_config(backend=backend, scope=scope, aux_loss_weight=0.1, z_loss_weight=0.01)
    cfg.mtp, cfg.document_masking = MtpConfig(depth=mtp), masking
    return cfg


def wrapped(model: MoETransformer) -> ComposerMoECausalLM:
    model.use_losses(build_losses(LossesConfig(router_entropy=LossConfig(0.1), logits_z=LossConfig(0.1))))
    return ComposerMoECausalLM(model)


def build(mode: str = "none", dtype: torch.dtype = torch.float32, **options: Any) -> ComposerMoECausalLM:
    return wrapped(tiny_model(config(**options), activation_checkpointing=mode, dtype=dtype))


def rows_of(whole: Batch, rows: slice) -> Batch:
    """Some samples, as Composer splits a batch."""
    return {name: values[rows] for name, values in whole.items()}


def without_padding(row: int, masking: bool) -> Batch:
    return with_counts(
        {"input_ids": ROWS[row][None], "labels": ROWS[row][None], "sequence_id": OF_ROWS[row][None]}, masking
    )


def step(model: ComposerMoECausalLM, whole: Batch, parts: list[Batch]) -> dict[str, Tensor]:
    """Losses, statistics and gradients of a global batch, of which this rank has ``whole``, in micro-batches."""
    CountTargets().batch_start(SimpleNamespace(batch=whole, model=model), None)
    samples = len(whole["input_ids"])
    total: dict[str, Any] = {}
    for part in parts:
        outputs = model(part)
        found = {name: value * len(part["input_ids"]) / samples for name, value in model.loss(outputs, part).items()}
        found["total"].backward()
        slots_L = outputs.tokens_per_expert.sum(dim=1)
        found |= {"slots": outputs.tokens_per_expert, "entropy": outputs.router_entropy * slots_L}
        total = {name: total.get(name, 0) + value.detach() for name, value in found.items()}
    return total | gradients(model.model)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Losses and statistics relative to themselves, gradients to the norm of all."""
    assert got.keys() == expected.keys()
    of_weights = [name for name in expected if name.endswith("weight") or name.endswith("_proj")]
    norm = torch.stack([expected[name].norm() for name in of_weights]).norm()
    for name, value in expected.items():
        scale = norm if name in of_weights else value.double().norm()
        error = (got[name] - value).double().norm() / scale.clamp(min=1e-9)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("masking", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize(
    ("backend", "mode", "dtype", "tolerance"),
    [
        ("loop", "none", torch.float64, 1e-7),
        ("grouped_mm", "full", torch.float32, 1e-6),
    ],
)
def test_a_padded_batch_is_its_sequences_by_themselves(
    backend: str, mode: str, dtype: torch.dtype, tolerance: float, masking: bool, mtp: int
) -> None:
    model = build(mode, dtype, backend=backend, masking=masking, mtp=mtp)
    padded = with_counts(PADDED, masking)
    outcome = step(model, padded, [padded])
    assert outcome["slots"].sum(dim=1).tolist() == [
        2 * sum(max(n - depth, 0) for n in TOKENS) for depth in (0, 0, *range(1, mtp + 1))
    ]
    model.zero_grad()
    assert_same(outcome, step(model, padded, [without_padding(row, masking) for row in range(len(ROWS))]), tolerance)
    model.zero_grad()
    assert_same(outcome, step(model, padded, [rows_of(padded, slice(r, r + 4)) for r in (0, 4)]), tolerance)


@pytest.mark.parametrize("masking", [False, True], ids=["plain", "documents"])
def test_longrope_goes_by_lengths_without_padding(masking: bool) -> None:
    cfg = config(masking=masking, mtp=2)
    cfg.attention = GqaConfig(n_heads=4, n_kv_heads=2, longrope=LongRopeConfig(8, [1.0] * 4, [1.0, 3.0, 9.0, 40.0]))
    model, padded = wrapped(tiny_model(cfg, dtype=torch.float64)), with_counts(PADDED, masking)
    outcome = step(model, padded, [padded])
    model.zero_grad()
    assert_same(outcome, step(model, padded, [without_padding(row, masking) for row in range(len(ROWS))]), 1e-7)


def test_balance_over_the_global_batch_counts_real_tokens() -> None:
    model, padded = build(scope="global_batch"), with_counts(PADDED, False)
    assert model.model.step_counts is not None
    model.model.step_counts.begin_step()
    balance = step(model, padded, [padded])["balance"]
    routed = [model(without_padding(row, False)) for row in range(len(ROWS))]
    counts_LE = torch.stack([losses.tokens_per_expert for losses in routed]).sum(0)
    parts = []
    for row, alone in enumerate(routed):  # by its definition: each part's mean scores with the counts of all
        model.model.step_counts._total = counts_LE - alone.tokens_per_expert
        parts.append(model(without_padding(row, False)).balance)
    torch.testing.assert_close(balance, torch.stack(parts).mean(), rtol=1e-6, atol=0)


def test_a_batch_without_padding_has_the_bits_of_one_without_documents() -> None:
    ids = batch(4, 16)
    plain = with_counts({"input_ids": ids, "labels": ids})
    numbered = with_counts(plain | {"sequence_id": torch.zeros_like(ids)})
    outcomes = [step(model, each, [each]) for model, each in ((build(mtp=1), plain), (build(mtp=1), numbered))]
    for name, value in outcomes[0].items():
        assert torch.equal(value, outcomes[1][name]), name
    real = RealTokens(numbered["sequence_id"], numbered["tokens_of_rows"])
    assert real.places(0) is None
    assert real.places(1) is None


def test_real_tokens_by_hand() -> None:
    documents = torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1], [0, 1, 2, 3]])
    real = RealTokens.of(documents, None)
    assert real.tokens_of_rows == [3, 0, 4]
    assert real.places().tolist() == [0, 1, 2, 8, 9, 10, 11]
    assert real.places(2).tolist() == [0, 4, 5]
    assert count_at_depths(documents, 5).tolist() == [7, 5, 3, 1, 0]
    of_batch = torch.tensor([3.5, 2.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert real.shares(of_batch).tolist() == pytest.approx([7 / 10.5, 5 / 7.5, 0, 0, 0])


def moe_layer(precision: PrecisionConfig) -> MoELayer:
    layer = tiny_model(tiny_config(), precision=precision).layers[1].ffn
    assert isinstance(layer, MoELayer)
    return layer


FP8 = [PrecisionConfig(compute=Compute.bf16_emulated, fp8=Fp8Config(recipe=recipe)) for recipe in Fp8Recipe]


@pytest.mark.parametrize("precision", [PrecisionConfig(), *FP8], ids=["fp32", *Fp8Recipe])
def test_a_layer_sees_the_real_tokens_alone_in_every_precision(precision: PrecisionConfig) -> None:
    layer, x_BSD = moe_layer(precision), torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    real_T = torch.tensor([0, 1, 2, 6, 12, 13, 14, 15, 16, 17])
    layer.capacity_factor = 0.7
    out_BSD, stats = layer(x_BSD, real_T)
    expected_1TD, of_real = layer(x_BSD.flatten(0, 1)[real_T].unsqueeze(0))
    assert torch.equal(out_BSD.flatten(0, 1)[real_T], expected_1TD[0])
    assert out_BSD[3].eq(0).all()
    assert stats.dropped_slots > 0
    for name in ("z_loss", "tokens_per_expert", "dropped_slots", "router_entropy", "mean_probs"):
        assert torch.equal(getattr(stats, name), getattr(of_real, name)), name


def test_mixtures_are_not_called_with_padding() -> None:
    layer, seen = moe_layer(PrecisionConfig()), []
    mixture = layer.experts.mixture
    layer.experts.mixture = lambda tokens, *rest: (
        seen.append((len(tokens), len(rest[-1].slot_of_row_N))) or mixture(tokens, *rest)
    )
    layer(torch.randn(2, 6, WIDTH), torch.tensor([0, 1, 2, 6]))
    assert seen == [(4, 8)]


def test_a_micro_batch_of_padding_alone() -> None:
    model = build(mtp=1)
    nothing = with_counts({name: torch.full((2, 8), fill) for name, fill in _NOTHING.items()})
    losses = step(model, PADDED, [nothing])
    assert losses["total"] == 0
    assert losses["slots"].sum() == 0
    assert all(grad.abs().sum() == 0 for grad in gradients(model.model).values())


_NOTHING = {"input_ids": 0, "labels": -100, "sequence_id": -1}


def test_tokens_are_counted_without_padding() -> None:
    assert count_tokens(PADDED)["total"] == sum(TOKENS)
    assert count_tokens(PADDED)["loss_generating"] == sum(TOKENS) - sum(map(len, LENGTHS))
    assert count_tokens(with_counts(PADDED, False))["loss_generating"] == sum(TOKENS) - len(TOKENS)


def test_llm_foundrys_attention_mask_tells_padding() -> None:
    model = FoundryMoECausalLM(
        vocab_size=61, d_model=32, n_layers=2, ffn_hidden_size=48, attention={"n_heads": 4, "n_kv_heads": 2},
        moe={"num_experts": EXPERTS, "top_k": 2, "expert_hidden_size": 16},
    )  # fmt: skip
    mask = (PADDED["sequence_id"] >= 0).to(torch.uint8)
    foreign = {"input_ids": PADDED["input_ids"], "labels": PADDED["labels"], "attention_mask": mask}
    assert model(foreign).tokens_per_expert.sum(dim=1).tolist() == [2 * sum(TOKENS)] * 2
    with pytest.raises(ValueError, match=r"^attention_mask: padding stands before tokens; pad on the right"):
        model(foreign | {"attention_mask": mask.flip(1)})


def on_mesh(sizes: tuple[int, int, int] | None, micro_batches: int) -> dict[str, Tensor]:
    """The losses of the global batch and all gradients, with as many samples on each rank."""
    import torch.distributed as dist

    from moefoundry.config import ActivationCheckpointing, MeshConfig
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import meta_model
    from moefoundry.parallel import begin_micro_batch, materialize, parallelize
    from tests.test_parallel import full

    rank, ranks = (0, 1) if sizes is None else (dist.get_rank(), dist.get_world_size())
    model = meta_model(config("grouped_mm", mtp=1, masking=True))
    meshes = sizes and build_meshes(resolve_degrees(MeshConfig(*sizes), ranks), "cpu")
    parallelize(model, meshes, PrecisionConfig(), ActivationCheckpointing.full)
    materialize(model, "cpu", 3)
    share = len(ROWS) // ranks
    own = rows_of(PADDED, slice(rank * share, (rank + 1) * share))
    size = share // micro_batches
    parts = [rows_of(own, slice(first, first + size)) for first in range(0, share, size)]
    composer_model = wrapped(model)
    plain = composer_model.forward

    def forward(part: Batch) -> Any:
        begin_micro_batch(model, part is parts[-1])
        return plain(part)

    composer_model.forward = forward
    outcome = step(composer_model, own, parts)
    losses = {name: value for name, value in outcome.items() if value.dim() == 0 or name in ("slots", "entropy")}
    for name, value in losses.items():
        if ranks > 1:
            dist.all_reduce(value)
        losses[name] = value / (1 if name in ("slots", "entropy") else ranks)
    return losses | {name: full(value) for name, value in gradients(model).items()}


@pytest.mark.parametrize(
    ("sizes", "micro_batches"), [((2, 2, 2), 2), pytest.param((1, 2, 1), 1, marks=pytest.mark.slow)]
)
def test_meshes_weigh_tokens_equally(sizes: tuple[int, int, int], micro_batches: int) -> None:
    expected = on_mesh(None, 1)
    for outcome in run_distributed(on_mesh, sizes[0] * sizes[1], sizes, micro_batches):
        assert_same(outcome, expected)
