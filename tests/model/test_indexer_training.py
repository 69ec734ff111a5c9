"""Training of the indexers: the loss of the report by plain loops in float64, what trains in each stage and what does
not, and the same on ranks and with recomputed activations."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    BalanceConfig,
    Compute,
    Fp8Config,
    Fp8Recipe,
    IndexerConfig,
    IndexerStage,
    MeshConfig,
    MlaConfig,
    ModelConfig,
    MtpConfig,
    PrecisionConfig,
    YarnConfig,
)
from moefoundry.model import indexer as module
from moefoundry.model.context import AttentionContext, attention_context
from moefoundry.model.indexer import Indexer, Scores, divergence
from moefoundry.model.transformer import CausalLMLosses, MoETransformer, meta_model
from moefoundry.parallel import materialize, parallelize
from moefoundry.precision import full_precision_modules
from tests.distributed import run_distributed
from tests.model.tiny import batch, gradients, tiny_config

TOP_K, LENGTH = 4, 12
LATENT = MlaConfig(
    n_heads=4,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    yarn=YarnConfig(4.0, 8, beta_fast=4.0),
)
DOCUMENTS = torch.tensor([[0] * 12, [0] * 5 + [1] * 4 + [-1] * 3])
STAGES = pytest.mark.parametrize("stage", [IndexerStage.warm_up, IndexerStage.sparse])


def config(stage: IndexerStage, **changes: object) -> ModelConfig:
    attention = replace(LATENT, indexer=IndexerConfig(TOP_K, 3, 10, stage, loss_weight=0.7))
    cfg = replace(tiny_config(backend="loop"), attention=attention, **changes)
    cfg.moe.balance = BalanceConfig(aux_loss_weight=0.0, z_loss_weight=0.0)
    return cfg


FROZEN = config(IndexerStage.frozen)


def built(cfg: ModelConfig, mode: str = "none", dtype: torch.dtype = torch.float64) -> MoETransformer:
    model = meta_model(cfg).to(dtype)
    parallelize(model, None, PrecisionConfig(), ActivationCheckpointing(mode))
    materialize(model, "cpu", 3)
    return model


def step(model: MoETransformer, documents: Tensor | None = None) -> CausalLMLosses:
    losses: CausalLMLosses = model(batch(2, LENGTH), batch(2, LENGTH), sequence_id=documents)
    losses.total.backward()
    return losses


def by_loops(q: Tensor, k: Tensor, scores: Tensor, seen: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Equations 3 and 4 of DeepSeek-V3.2-Exp, a query at a time."""
    rows = []
    for row in range(len(q)):
        for at in range(q.shape[2]):
            keys = seen[row, at].nonzero().flatten()
            total = torch.zeros(len(keys), dtype=q.dtype)
            for head in range(q.shape[1]):
                weights = (k[row, head, keys] @ q[row, head, at] * scale).exp()
                total += weights / (weights.sum() + (0.0 if sinks is None else sinks[head].exp()))
            p = (total / total.abs().sum()).detach()
            chances = scores[row, at, keys].exp() / scores[row, at, keys].exp().sum()
            rows.append((p * (p / chances).log()).sum())
    return torch.stack(rows).view(len(q), -1)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0], dtype=torch.float64)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_and_its_gradients_by_loops(
    masked: bool, sinks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INDEXER_QUERIES", 3)  # several parts, the last one shorter
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    q, k = drawn(2, 2, 7, 5), drawn(2, 2, 7, 5)
    scores = Scores(drawn(2, 3, 7, 4), drawn(2, 7, 4), drawn(2, 7, 3))
    seen = torch.ones(7, 7).tril().bool().expand(2, -1, -1)
    if masked:
        seen = (seen & (torch.rand(2, 7, 7, generator=draw) < 0.5)) | torch.eye(7).bool()
    rotation = attention_context(config(IndexerStage.sparse), batch(2, 7)).rotation
    context = AttentionContext(rotation, seen.unsqueeze(1) if masked else None, is_causal=not masked)
    found = divergence(scores, q, k, context, 0.4, sinks)
    by_hand = torch.einsum("bhsd,bld->bhsl", scores.q_BHSd, scores.k_BLd).relu() / 2
    expected = by_loops(q, k, torch.einsum("bhsl,bsh->bsl", by_hand, scores.weights_BSH), seen, 0.4, sinks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert expected.min() > -1e-12
    assert expected.mean() > 0.1
    weights = torch.rand(2, 7, generator=draw, dtype=torch.float64)
    own = torch.autograd.grad((found * weights).sum(), [q, k, *scores], allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), [*scores])
    assert own[:2] == (None, None), "attention learns nothing from it"
    for mine, other in zip(own[2:], theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_warm_up_trains_the_indexers_alone_beside_dense_attention() -> None:
    model = built(config(IndexerStage.warm_up, mtp=MtpConfig(depth=1)))
    dense = built(replace(model.cfg, attention=LATENT))
    losses, expected = step(model), step(dense)
    assert torch.equal(losses.lm, expected.lm)
    assert torch.equal(losses.mtp, expected.mtp)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert gradients(model).keys() == trained
    assert all(gradient.abs().max() > 0 for gradient in gradients(model).values())
    assert losses.indexer_kl is not None
    assert losses.indexer_kl.shape == (4,), "three blocks and a module"
    torch.testing.assert_close(losses.indexer, 0.7 * losses.indexer_kl.sum(), rtol=1e-12, atol=0)
    assert expected.indexer_kl is None
    assert expected.indexer == 0
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(batch(2, LENGTH)), dense.eval()(batch(2, LENGTH))), "sparse when it is used"


def test_the_sparse_stage_trains_both_apart() -> None:
    """The main model as with frozen indexers that choose the same, and these by the divergence alone."""
    model, frozen = built(config(IndexerStage.sparse)), built(config(IndexerStage.frozen))
    frozen.load_state_dict(model.state_dict())
    losses, expected = step(model), step(frozen)
    assert torch.equal(losses.lm, expected.lm)
    assert expected.indexer_kl is None
    own, others = gradients(model), gradients(frozen)
    assert own.keys() - others.keys() == {name for name in own if ".indexer." in name}
    assert others.keys() < own.keys()
    for name, gradient in others.items():
        assert torch.equal(own[name], gradient), name
    both = {name: gradient for name, gradient in own.items() if ".indexer." in name}
    model.zero_grad()
    model(batch(2, LENGTH), batch(2, LENGTH)).indexer.backward()
    assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in both.items())
    assert gradients(model).keys() == both.keys()


@STAGES
def test_padding_is_not_counted_and_documents_are_as_alone(stage: IndexerStage) -> None:
    """As the mean over the tokens of the three documents, each by itself."""
    model = built(config(stage, document_masking=True))
    found = model(batch(2, LENGTH), batch(2, LENGTH), sequence_id=DOCUMENTS).indexer_kl
    total = 0.0
    for row, part in ((0, slice(0, 12)), (1, slice(0, 5)), (1, slice(5, 9))):
        ids = batch(2, LENGTH)[row : row + 1, part]
        total += model(ids, ids, sequence_id=torch.zeros_like(ids)).indexer_kl * ids.numel()
    torch.testing.assert_close(found, total / 21, rtol=1e-10, atol=0)


@STAGES
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_change_nothing(stage: IndexerStage, mode: str) -> None:
    cfg = config(stage, mtp=MtpConfig(depth=1))
    model, plain = built(cfg, mode), built(cfg)
    losses, expected = step(model), step(plain)
    assert torch.equal(losses.total, expected.total)
    assert gradients(model).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=0, atol=1e-14)


def test_new_indexers_begin_as_other_weights_do() -> None:
    model = built(config(IndexerStage.warm_up), dtype=torch.float32)
    indexer = model.layers[0].attention.indexer  # type: ignore[union-attr]
    assert torch.equal(indexer.k_norm_weight, torch.ones(10))  # type: ignore[union-attr]
    assert torch.equal(indexer.k_norm_bias, torch.zeros(10))  # type: ignore[union-attr]
    assert indexer.q_proj.std() > 0.1  # type: ignore[union-attr]


def on_ranks(mesh: tuple[int, int, int] | None, cfg: ModelConfig, precision: PrecisionConfig) -> dict[str, Tensor]:
    """Losses and gradients of the batch, of which each rank has its rows."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from moefoundry.mesh import build_meshes, resolve_degrees

    ranks = 1 if mesh is None else mesh[0] * mesh[1]
    meshes = None if mesh is None else build_meshes(resolve_degrees(MeshConfig(*mesh), ranks), "cpu")
    model = meta_model(cfg)
    parallelize(model, meshes, precision, ActivationCheckpointing.full)
    materialize(model, "cpu", 3)
    ids = batch(2, LENGTH).chunk(ranks)[0 if ranks == 1 else dist.get_rank()]
    losses = model(ids, ids)
    losses.total.backward()
    found = {"lm": losses.lm.detach(), "kl": losses.indexer_kl.detach().clone()}
    for value in found.values():
        if ranks > 1:
            dist.all_reduce(value)
            value /= ranks
    for name, gradient in gradients(model).items():
        found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


@STAGES
def test_two_ranks_learn_what_one_does(stage: IndexerStage) -> None:
    cfg = config(stage)
    (expected,) = run_distributed(on_ranks, 1, None, cfg, PrecisionConfig())
    for mesh in ((1, 2, 1), (1, 2, 2)):
        for found in run_distributed(on_ranks, 2, mesh, cfg, PrecisionConfig()):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                bound = 2e-5 * value.abs().max().item()
                torch.testing.assert_close(
                    found[name], value, rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}"
                )


def test_scores_stay_fp32_where_all_else_is_narrower() -> None:
    """Their tensors are not cast, and the divergence is near that of fp32; with FP8, queries are computed twice."""
    cfg, bf16 = config(IndexerStage.warm_up), PrecisionConfig(Compute.bf16)
    assert sum(isinstance(each, Indexer) for each in full_precision_modules(built(cfg), bf16)) == cfg.n_layers
    assert not any(isinstance(each, Indexer) for each in full_precision_modules(built(FROZEN), bf16))
    (exact,) = run_distributed(on_ranks, 1, (1, 1, 1), cfg, PrecisionConfig())
    for precision in (bf16, PrecisionConfig(Compute.bf16_emulated, fp8=Fp8Config(Fp8Recipe.deepseek_v3))):
        (found,) = run_distributed(on_ranks, 1, (1, 1, 1), cfg, precision)
        torch.testing.assert_close(found["kl"], exact["kl"], rtol=0.1, atol=0)
        assert found.keys() == exact.keys()
