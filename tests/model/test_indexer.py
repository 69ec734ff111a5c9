"""The choice of keys: the best by a plain loop, none that are not seen, and the same with a cache."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefoundry.config import IndexerConfig, MlaConfig, ModelConfig
from moefoundry.model.cache import KVCache, LayerCache
from moefoundry.model.context import attention_context
from moefoundry.model.indexer import NORM_EPS, Indexer
from moefoundry.model.rope import rotate
from moefoundry.model.transformer import MoETransformer
from tests.conversion.transformers5 import randomize
from tests.model.tiny import tiny_config

CONFIG = IndexerConfig(top_k=3, n_heads=2, head_dim=10)
MLA = MlaConfig(
    n_heads=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, indexer=CONFIG
)
LENGTH = 7


def model_of(attention: MlaConfig) -> ModelConfig:
    return replace(tiny_config(), attention=attention)


def indexer() -> Indexer:
    made = Indexer(CONFIG, d_model=8, query_rank=12, rope_width=4)
    randomize(made, seed=2)
    return made


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, LENGTH, 8, generator=draw), torch.randn(2, LENGTH, 12, generator=draw)


def chosen_by_a_loop(made: Indexer, x: Tensor, q: Tensor, seen: Tensor) -> Tensor:
    """Of each query, the keys that it sees with the three largest sums over heads of weight * relu(q . k)."""
    context = attention_context(model_of(MLA), torch.zeros(x.shape[:2], dtype=torch.int64))
    mask = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)

    def turned(values: Tensor) -> Tensor:
        return torch.cat([rotate(values[..., :4], context.rotation), values[..., 4:]], dim=-1)

    keys = torch.nn.functional.layer_norm(x @ made.k_proj.T, (10,), made.k_norm_weight, made.k_norm_bias, NORM_EPS)
    keys = turned(keys)
    queries = [turned(q @ made.q_proj[10 * head : 10 * head + 10].T) for head in range(2)]
    weights = x @ made.head_proj.T
    for row in range(2):
        for at in range(LENGTH):
            scores = {
                key: sum(
                    (weights[row, at, head] * (queries[head][row, at] @ keys[row, key]).relu()).item()
                    for head in range(2)
                )
                for key in range(LENGTH)
                if seen[row, at, key]
            }
            for key in sorted(scores, key=lambda key: -scores[key])[:3]:
                mask[row, at, key] = True
    return mask


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 2]])])
def test_the_best_keys_remain(documents: Tensor | None) -> None:
    made, (x, q) = indexer(), inputs()
    ids = torch.zeros(2, LENGTH, dtype=torch.int64)
    context = attention_context(model_of(MLA), ids, documents)
    seen = torch.ones(LENGTH, LENGTH).tril().bool().expand(2, -1, -1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None])
        context = context._replace(rotation=attention_context(model_of(MLA), ids).rotation)
    found, _ = made(x, q, context)
    assert not found.is_causal
    assert found.mask is not None
    assert torch.equal(found.mask[:, 0], chosen_by_a_loop(made, x, q, seen))


def test_as_many_keys_as_it_lets_through_are_dense() -> None:
    made, (x, q) = indexer(), inputs()
    context = attention_context(model_of(MLA), torch.zeros(2, 3, dtype=torch.int64))
    assert made(x[:, :3], q[:, :3], context)[0] is context


def test_a_cache_chooses_what_the_whole_sequence_does() -> None:
    made, (x, q) = indexer(), inputs()
    whole, _ = made(x, q, attention_context(model_of(MLA), torch.zeros(2, LENGTH, dtype=torch.int64)))
    cache = LayerCache()
    for start, stop in ((0, 4), (4, 5), (5, LENGTH)):
        ids = torch.zeros(2, stop - start, dtype=torch.int64)
        part, _ = made(x[:, start:stop], q[:, start:stop], attention_context(model_of(MLA), ids, None, start), cache)
        assert part.mask is not None
        assert torch.equal(part.mask, whole.mask[:, :, start:stop, :stop])  # type: ignore[index]


@torch.no_grad()
def test_a_model_with_a_cache_gives_the_same_logits() -> None:
    many_heads = IndexerConfig(
        top_k=3, n_heads=16, head_dim=10
    )  # with few, some scores are all 0, and the choice is open
    model = MoETransformer(model_of(replace(MLA, indexer=many_heads))).eval()
    randomize(model, seed=0)
    ids = torch.randint(model.cfg.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.cfg.n_layers)
    parts = [model(ids[:, :5], cache=cache), *(model(ids[:, at : at + 1], cache=cache) for at in range(5, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-5)


def test_training_leaves_it_as_it_is_and_reaches_all_else() -> None:
    model = MoETransformer(model_of(MLA))
    randomize(model, seed=0)
    ids = torch.randint(model.cfg.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids, ids).total.backward()
    assert not any("indexer" in name for name, _ in model.named_parameters())
    assert sum("indexer" in name for name, _ in model.named_buffers()) == 5 * model.cfg.n_layers
    assert all(parameter.grad is not None for parameter in model.parameters())
