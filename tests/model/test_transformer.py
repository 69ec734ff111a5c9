"""What the whole model promises beside parity with transformers: causality, loss terms, micro-batching, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moefoundry.config import AttentionConfig, UserError
from moefoundry.model.attention import build_attention
from moefoundry.model.transformer import CausalLMLosses, MoETransformer
from moefoundry.moe.layer import MoELayer, RoutingStats
from moefoundry.ops.sizes import CHUNK_TOKENS
from tests.model.tiny import EXPERTS, VOCAB, batch, gradients, tiny_config, tiny_model

B, S = 3, 12


def float64_model(**options: object) -> MoETransformer:
    return tiny_model(tiny_config(backend="loop", **options), dtype=torch.float64)


def run_with_stats(model: MoETransformer, ids: Tensor) -> tuple[CausalLMLosses, list[RoutingStats]]:
    """The losses, and the statistics that the MoE layers returned on the way."""
    stats: list[RoutingStats] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: stats.append(out[1]))
        for module in model.modules()
        if isinstance(module, MoELayer)
    ]
    losses = model(ids, ids)
    for hook in hooks:
        hook.remove()
    return losses, stats


@pytest.mark.parametrize("position", [0, 5, S - 1])
@pytest.mark.parametrize("n_dense_layers", [0, 3], ids=["sparse", "dense"])
def test_a_token_changes_no_logits_before_it_nor_in_other_sequences(n_dense_layers: int, position: int) -> None:
    model, ids = float64_model(n_dense_layers=n_dense_layers), batch(B, S)
    changed = ids.clone()
    changed[1, position] = (ids[1, position] + 1) % VOCAB
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1, :position], before[1, :position], rtol=0, atol=1e-12)
    assert ((after - before)[1, position:].abs().amax(dim=1) > 1e-6).all()


def test_logits_do_not_depend_on_absolute_length() -> None:
    model, ids = float64_model(), batch(B, S)
    torch.testing.assert_close(model(ids[:, :7]), model(ids)[:, :7], rtol=0, atol=1e-12)


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model, ids = float64_model(), batch(B, S)
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    losses = model(ids, ids)
    torch.testing.assert_close(losses.lm, expected, rtol=0, atol=1e-12)
    assert losses.num_targets == B * (S - 1)


def test_total_is_the_sum_of_terms_and_terms_are_weighted_sums_over_layers() -> None:
    model = float64_model(aux_loss_weight=0.3, z_loss_weight=0.07)
    losses, stats = run_with_stats(model, batch(B, S))
    assert len(stats) == 2
    assert torch.equal(losses.total, losses.lm + losses.balance + losses.z)
    torch.testing.assert_close(losses.balance, 0.3 * sum(s.balance_loss for s in stats), rtol=0, atol=1e-14)
    torch.testing.assert_close(losses.z, 0.07 * sum(s.z_loss for s in stats), rtol=0, atol=1e-14)
    assert torch.equal(losses.tokens_per_expert, torch.stack([s.tokens_per_expert for s in stats]))
    assert losses.tokens_per_expert.sum(dim=1).tolist() == [B * S * 2] * 2
    assert torch.equal(losses.router_entropy, torch.stack([s.router_entropy for s in stats]))


def test_zero_weights_leave_only_the_language_model_loss() -> None:
    model = float64_model(aux_loss_weight=0.0, z_loss_weight=0.0)
    losses = model(batch(), batch())
    assert torch.equal(losses.total, losses.lm)
    losses.total.backward()
    total = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    model(batch(), batch()).lm.backward()
    assert all(torch.equal(total[name], grad) for name, grad in gradients(model).items())


def test_dense_model_has_empty_statistics() -> None:
    losses = tiny_model(tiny_config(n_dense_layers=3))(batch(), batch())
    assert (losses.balance.item(), losses.z.item()) == (0, 0)
    assert torch.equal(losses.total, losses.lm)
    assert losses.tokens_per_expert.shape == (0, EXPERTS)
    assert losses.router_entropy.shape == (0,)


def test_nothing_to_predict_is_a_loss_of_zero_and_finite_gradients() -> None:
    model = tiny_model(tiny_config())
    losses = model(batch(), torch.full_like(batch(), -100))
    assert losses.lm.item() == losses.num_targets.item() == 0
    losses.total.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny_model(tiny_config())
    model(batch(), batch()).total.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("split", [[6], [3, 3], [1, 5], [1] * 6], ids=str)
def test_micro_batches_give_the_losses_and_gradients_of_the_whole_batch(split: list[int]) -> None:
    model, ids = float64_model(aux_loss_weight=0.3, z_loss_weight=0.07), batch(6, S)
    whole = model(ids, ids)
    whole.total.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    total = 0.0
    for part in ids.split(split):
        loss = model(part, part).total * len(part) / len(ids)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.total.item(), abs=1e-12)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-12, msg=lambda text, name=name: name + text)


def test_backends_agree_on_losses_and_gradients_to_fp32_rounding() -> None:
    models = [tiny_model(tiny_config(backend=backend)) for backend in ("grouped_mm", "loop")]
    losses = [model(batch(), batch()).total for model in models]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    ours, theirs = (gradients(model) for model in models)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_training_step_never_holds_all_logits() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    sequences, length = 12, 128
    tokens = sequences * length
    cfg = tiny_config(n_layers=1, n_dense_layers=0)
    cfg.vocab_size = 256
    model, ids = tiny_model(cfg), batch(sequences, length)
    assert tokens > CHUNK_TOKENS
    with Largest() as largest:
        model(ids, ids).total.backward()
    assert largest.numel == CHUNK_TOKENS * cfg.vocab_size < tokens * cfg.vocab_size


def test_two_runs_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        model = tiny_model(tiny_config())
        losses = model(batch(), batch())
        losses.total.backward()
        return [losses.total, *gradients(model).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_unknown_attention_is_named() -> None:
    cfg = tiny_config()
    cfg.attention = AttentionConfig(kind="mystery")
    with pytest.raises(UserError, match=r"^model\.attention\.kind: no 'mystery' among gqa, mla$"):
        build_attention(cfg)
