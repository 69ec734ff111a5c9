"""Multi-token prediction against one position after the other in float64, and on meshes against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    AdamWConfig,
    MeshConfig,
    ModelConfig,
    MtpConfig,
    PrecisionConfig,
    Recipe,
)
from moefoundry.model.context import attention_context
from moefoundry.model.transformer import MoETransformer
from tests.distributed import run_distributed
from tests.model.tiny import EXPERTS, VOCAB, WIDTH, batch, gradients, meta_model, tiny_config, tiny_model
from tests.train.runs import run_recipe

B, S, WEIGHT = 3, 10, 0.7


def mtp_config(depth: int, *, document_masking: bool = False, **options: object) -> ModelConfig:
    cfg = tiny_config(backend="loop", aux_loss_weight=0.3, z_loss_weight=0.07, **options)
    cfg.mtp = MtpConfig(depth=depth, loss_weight=WEIGHT)
    cfg.document_masking = document_masking
    return cfg


def float64_model(depth: int, **options: object) -> MoETransformer:
    return tiny_model(mtp_config(depth, **options), dtype=torch.float64)


def some_labels(ids: Tensor) -> Tensor:
    """A third of them is to be ignored, at other places in each sequence."""
    ignored = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.33
    return ids.masked_fill(ignored, -100)


def rms(x_D: Tensor, weight_D: Tensor) -> Tensor:
    return x_D / (x_D.square().mean() + 1e-6).sqrt() * weight_D


def by_hand(model: MoETransformer, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of all modules; of the model's own parts only its blocks are called, one sequence at a time."""
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for row, wanted in zip(ids, labels.tolist(), strict=True):
        targets += sum(label != -100 for label in wanted[1:])
        x_1SD = torch.stack([embedding[token] for token in row]).unsqueeze(0)
        for block in model.layers:
            x_1SD, _ = block(x_1SD, attention_context(model.cfg, row.unsqueeze(0)))
        hidden = [rms(x_D, model.norm.weight) for x_D in x_1SD[0]]
        for k, module in enumerate(model.mtp, start=1):
            joined = [
                torch.cat(
                    [
                        rms(embedding[row[i + k]], module.embedding_norm.weight),
                        rms(hidden[i], module.hidden_norm.weight),
                    ]
                )
                for i in range(S - k)
            ]
            x_1SD = torch.stack([module.proj.weight @ x for x in joined]).unsqueeze(0)
            hidden = list(module.block(x_1SD, attention_context(model.cfg, row[None, : S - k]))[0][0])
            for i in range(S - k - 1):
                if wanted[i + k + 1] != -100:
                    logits = head @ rms(hidden[i], module.norm.weight)
                    total = total + logits.exp().sum().log() - logits[wanted[i + k + 1]]
    return WEIGHT / len(model.mtp) * total / targets


@pytest.mark.parametrize("labels_of", [Tensor.clone, some_labels], ids=["all_labels", "some_labels"])
@pytest.mark.parametrize("depth", [1, 2])
def test_loss_and_all_gradients_equal_the_computation_by_hand(
    depth: int, labels_of: Callable[[Tensor], Tensor]
) -> None:
    model, ids = float64_model(depth), batch(B, S)
    loss, expected = model(ids, labels_of(ids)).mtp, by_hand(model, ids, labels_of(ids))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    loss.backward()
    got = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    expected.backward()
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.attention.q_proj.weight"} < got.keys()
    assert got.keys() == gradients(model).keys() == dict(model.named_parameters()).keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_part_of_the_total_and_its_blocks_are_balanced_too() -> None:
    losses, plain = float64_model(2)(batch(B, S), batch(B, S)), float64_model(0)(batch(B, S), batch(B, S))
    assert torch.equal(losses.total, losses.lm + losses.balance + losses.z + losses.mtp)
    assert torch.equal(losses.lm, plain.lm), "the main model does not see it"
    assert losses.mtp > 0 == plain.mtp
    assert losses.balance > plain.balance
    assert losses.z > plain.z
    assert losses.tokens_per_expert.sum(dim=1).tolist() == [2 * B * length for length in (S, S, S - 1, S - 2)]
    assert len(losses.router_entropy) == len(losses.dropped_slots) == 4


@pytest.mark.parametrize("split", [[1, 2], [1, 1, 1]], ids=str)
def test_micro_batches_weighted_by_their_targets_give_the_whole_batch(split: list[int]) -> None:
    model, ids = float64_model(2), batch(B, S)
    labels = some_labels(ids)
    whole = model(ids, labels)
    parts = [model(*part) for part in zip(ids.split(split), labels.split(split), strict=True)]
    for name in ("lm", "mtp"):
        total = sum(getattr(part, name) * part.num_targets for part in parts) / whole.num_targets
        torch.testing.assert_close(total, getattr(whole, name), rtol=0, atol=1e-12)


def test_a_document_learns_nothing_from_the_next() -> None:
    """Two documents in a row give what each gives by itself."""
    model, ids = float64_model(2, document_masking=True), batch(1, 16)
    sequence_id = torch.tensor([[0] * 7 + [1] * 9])
    packed = model(ids, ids, sequence_id=sequence_id)
    alone = [model(part, part, sequence_id=torch.zeros_like(part)) for part in ids.split([7, 9], dim=1)]
    for name in ("lm", "mtp"):
        total = sum(getattr(part, name) * part.num_targets for part in alone) / packed.num_targets
        torch.testing.assert_close(getattr(packed, name), total, rtol=0, atol=1e-12)


def test_evaluation_and_logits_do_without_it() -> None:
    model, plain, ids = float64_model(1).eval(), float64_model(0).eval(), batch(B, S)
    called: list[object] = []
    model.mtp[0].register_forward_hook(lambda *args: called.append(args))
    losses, expected = model(ids, ids), plain(ids, ids)
    assert torch.equal(model(ids), plain(ids))
    assert not called
    assert losses.mtp == 0
    for name, value in losses._asdict().items():
        same = torch.equal(value, getattr(expected, name)) if isinstance(value, Tensor) else not value
        assert same, name


def test_modules_have_their_own_blocks_and_share_embedding_and_head() -> None:
    model = meta_model(mtp_config(2))
    shapes = {name: tuple(p.shape) for name, p in model.mtp[1].named_parameters() if not name.startswith("block.")}
    norms = dict.fromkeys(("embedding_norm.weight", "hidden_norm.weight", "norm.weight"), (WIDTH,))
    assert shapes == {**norms, "proj.weight": (WIDTH, 2 * WIDTH)}
    blocks = {name.removeprefix("layers.2.") for name in model.state_dict() if name.startswith("layers.2.")}
    assert {n.removeprefix("mtp.1.block.") for n in model.state_dict() if n.startswith("mtp.1.block.")} == blocks


def test_tied_embeddings_get_the_gradients_of_both_uses() -> None:
    model, ids = float64_model(1, tie_embeddings=True), batch(B, S)
    loss, expected = model(ids, ids).mtp, by_hand(model, ids, ids)
    weight = model.embed_tokens.weight
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight), rtol=0, atol=1e-11
    )


def test_sequences_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^sequences of 2 tokens leave none to model.mtp.depth 2$"):
        float64_model(2)(batch(B, 2), batch(B, 2))


# --------------------------------------------------------------------------------------------------------- on meshes


def train(
    mesh: tuple[int, int, int] | None, checkpointing: str, micro_batches: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """AdamW steps in float64 on fixed batches: the mean loss of each step, and the parameters."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.optim import build_adamw
    from moefoundry.parallel import materialize, moe_layer_indices, parallelize

    rank, ranks = (0, 1) if mesh is None else (dist.get_rank(), dist.get_world_size())
    cfg = mtp_config(2)
    cfg.moe.backend = "loop"
    with torch.device("meta"):
        model = MoETransformer(cfg).double()
    meshes = mesh and build_meshes(resolve_degrees(MeshConfig(*mesh), ranks), "cpu")
    parallelize(model, meshes, PrecisionConfig(), ActivationCheckpointing(checkpointing))
    materialize(model, "cpu", seed=0)
    assert moe_layer_indices(model) == [1, 2, 3, 4]
    optimizer = build_adamw(model, AdamWConfig(lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        tokens = torch.randint(VOCAB, (8, S), generator=generator).chunk(ranks)[rank]
        loss = torch.zeros((), dtype=torch.float64)
        for micro_batch in tokens.chunk(micro_batches):
            micro_loss = model(micro_batch, micro_batch).total / micro_batches
            micro_loss.backward()
            loss += micro_loss.detach()
        if ranks > 1:
            dist.all_reduce(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss / ranks)
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return torch.stack(losses), whole


@pytest.mark.parametrize(
    "mesh", [(1, 2, 1), (2, 1, 1), (1, 2, 2)], ids="replicate{0[0]}-shard{0[1]}-expert{0[2]}".format
)
def test_training_on_two_ranks_equals_one_process(mesh: tuple[int, int, int]) -> None:
    losses, parameters = run_distributed(train, 1, None, "none", 1)[0]
    assert losses[-1] < losses[0]
    for sharded_losses, sharded in run_distributed(train, 2, mesh, "full", 2):
        torch.testing.assert_close(sharded_losses, losses, rtol=1e-10, atol=0)
        assert sharded.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert (sharded[name] - parameter).norm() <= 1e-9 * parameter.norm(), name


def test_a_run_reports_it_apart(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe(tmp_path, "model.mtp={depth: 1, loss_weight: 0.5}", "eval_interval=2ba"), world_size=2)
    parts = [run.column(f"loss/train/{name}") for name in ("lm", "balance", "z", "mtp")]
    for number, total in run.column("loss/train/total").items():
        assert total == pytest.approx(sum(part[number] for part in parts), rel=1e-6)
    assert parts[-1][4] < parts[-1][1] == pytest.approx(0.5 * parts[0][1], rel=0.1), "both begin at log(vocabulary)"
    assert list(run.column("metrics/eval/LanguageCrossEntropy")) == [2, 4], "trained on after an evaluation without it"
    assert all(len(run.column(f"moe/load/layer{i}")[1]) == EXPERTS for i in (1, 2, 3))
    assert "loss/train/mtp" not in run_recipe(tiny_recipe(tmp_path / "plain", "max_duration=2ba")).metrics[0]
