"""Rotary embedding: what a rotation is, transformers' YaRN, and fp32 whatever the block computes in."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import _compute_yarn_parameters

from moefoundry.config import (
    Compute,
    GqaConfig,
    LongRopeConfig,
    MeshConfig,
    ModelConfig,
    PrecisionConfig,
    YarnConfig,
)
from moefoundry.conversion.families.rope_scaling import write_yarn
from moefoundry.evaluation.generation import greedy
from moefoundry.model.cache import KVCache
from moefoundry.model.context import AttentionKind, attention_context, attention_contexts
from moefoundry.model.rope import rotate, rotate_interleaved, rotation
from tests.distributed import run_distributed
from tests.model.peers import max_positions
from tests.model.tiny import batch, meta_model, tiny_config, tiny_model

CONVENTIONS = pytest.mark.parametrize("turn", [rotate, rotate_interleaved])


@CONVENTIONS
def test_rotation_keeps_lengths_and_depends_on_distance_alone(turn) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(8), torch.randn(8)
    rot = rotation(torch.arange(20), 8, GqaConfig(rope_theta=100.0))
    turned_query, turned_key = (turn(x.expand(1, 1, 20, 8).double(), rot)[0, 0] for x in (query, key))
    lengths = query.double().norm().expand(20)
    torch.testing.assert_close(turned_query.norm(dim=-1), lengths, rtol=1e-6, atol=0)
    for distance in range(5):
        products = (turned_query[distance:] * turned_key[: 20 - distance]).sum(dim=-1)
        torch.testing.assert_close(products, products[:1].expand_as(products), rtol=0, atol=1e-5)
    torch.testing.assert_close(turned_query[0], query.double())


def test_conventions_by_hand() -> None:
    """Frequencies 1 and 0.1 at position 2: a quarter of x is turned by 2, the other by 0.2."""
    rot = rotation(torch.tensor([2]), 4, GqaConfig(rope_theta=100.0))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([2.0, 0.2]).cos(), torch.tensor([2.0, 0.2]).sin()
    torch.testing.assert_close(rotate(x, rot).flatten(), torch.stack([cos[0], -sin[1], sin[0], cos[1]]))
    torch.testing.assert_close(rotate_interleaved(x, rot).flatten(), torch.stack([cos[0], sin[0], -sin[1], cos[1]]))


LONGROPE = LongRopeConfig(8, [1.0, 1.1, 1.5, 2.0], [1.0, 3.0, 9.0, 40.0], 1.1, 1.3)


def test_longrope_by_hand_of_each_document_by_its_length() -> None:
    """Documents of 5 and 10 tokens, and a row of one: the factors by length, at all positions."""
    documents = torch.tensor([[0] * 5 + [1] * 10, [0] * 15])
    attention = GqaConfig(n_heads=4, n_kv_heads=2, head_dim=8, rope_theta=100.0, longrope=LONGROPE)
    cfg = replace(tiny_config(), attention=attention)
    found = attention_context(cfg, batch(2, 15), documents).rotation
    for row, positions, is_long in ((0, slice(0, 5), False), (0, slice(5, 15), True), (1, slice(0, 15), True)):
        length = positions.stop - positions.start
        for pair, power in enumerate((0, 0.25, 0.5, 0.75)):
            factor = (LONGROPE.long_factors if is_long else LONGROPE.short_factors)[pair]
            angles = torch.arange(length) / (factor * 100.0**power)
            magnitude = 1.3 if is_long else 1.1
            for values, turned in ((found.cos, angles.cos()), (found.sin, angles.sin())):
                torch.testing.assert_close(values[row, 0, positions, pair], magnitude * turned, rtol=0, atol=2e-6)


def test_longrope_when_a_text_grows_beyond_the_short_factors() -> None:
    """Each token as by the whole text without a cache, alone and in a batch; a cache of short factors is no use."""
    cfg = replace(tiny_config(), attention=GqaConfig(n_heads=4, n_kv_heads=2, head_dim=8, longrope=LONGROPE))
    model = tiny_model(cfg).eval()
    ids = batch(1, 6)[0]
    expected = ids
    for _ in range(5):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected[None])[0, -1:].argmax(dim=-1)])
    assert greedy(model, ids, 5).tolist() == expected[6:].tolist()
    cache = KVCache(cfg.n_layers)
    model(ids[None], cache=cache)
    with pytest.raises(ValueError, match="6 tokens are cached, and beyond 8 LongRoPE turns all keys otherwise"):
        model(batch(1, 3), cache=cache)


def test_longrope_turns_nothing_of_blocks_without_a_rotation() -> None:
    attention = GqaConfig(n_heads=4, n_kv_heads=2, head_dim=8, unrotated_layers=[0, 1, 2])
    ids, documents = batch(2, 15), torch.tensor([[0] * 5 + [1] * 10, [0] * 15])
    for told in (None, documents):
        cfg = replace(tiny_config(), attention=attention, document_masking=told is not None)
        extended = replace(cfg, attention=replace(attention, longrope=LONGROPE))
        expected = tiny_model(cfg)(ids, ids, sequence_id=told).total
        assert torch.equal(tiny_model(extended)(ids, ids, sequence_id=told).total, expected)


def test_blocks_have_the_rotation_that_is_theirs() -> None:
    """Each block's queries and keys by the block alone: with a base of its own, without, or with that of all."""
    attention = GqaConfig(
        n_heads=2, n_kv_heads=2, sliding_window=3, sliding_window_layers=[0], sliding_window_rope_theta=50.0
    )
    attention.unrotated_layers = [1]
    cfg, ids = replace(tiny_config(), attention=attention), batch(1, 6)
    blocks = [AttentionKind(attention.window_of(i), attention.is_rotated(i)) for i in range(3)]
    contexts = attention_contexts(cfg, blocks, ids)
    width, positions = attention.rotary_dim(cfg.d_model), torch.arange(6)
    for kind, theta in zip(blocks, (50.0, None, attention.rope_theta), strict=True):
        if theta is None:
            assert contexts[kind].rotation.width == 0
        else:
            assert torch.equal(contexts[kind].rotation.cos, rotation(positions, width, GqaConfig(rope_theta=theta)).cos)
    assert [contexts[kind].mask is None for kind in blocks] == [False, True, True]


@CONVENTIONS
def test_positions_of_each_sequence(turn) -> None:
    positions = torch.tensor([[0, 1, 2], [0, 0, 1]])
    x = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    together = turn(x, rotation(positions, 8, GqaConfig()))
    for row in range(2):
        assert torch.equal(together[row], turn(x[row : row + 1], rotation(positions[row], 8, GqaConfig()))[0])


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(
    "yarn",
    [
        YarnConfig(40.0, 4096),
        YarnConfig(1.0, 4096),
        YarnConfig(factor=8.0, original_max_seq_len=512, beta_fast=16.0, beta_slow=2.0),
        YarnConfig(32.0, 4096, beta_fast=1.0, beta_slow=1.0),
        YarnConfig(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        YarnConfig(40.0, 4096, mscale=0.707, mscale_all_dim=1.5),
        YarnConfig(40.0, 4096, mscale=0.707),
    ],
    ids=str,
)
def test_yarn_equals_transformers(yarn: YarnConfig, width: int, theta: float) -> None:
    config = LlamaConfig(
        head_dim=width,
        rope_theta=theta,
        rope_scaling=write_yarn(yarn),
        max_position_embeddings=max_positions(yarn),
    )
    frequencies, factor = _compute_yarn_parameters(config, torch.device("cpu"))
    rot = rotation(torch.arange(2), width, GqaConfig(rope_theta=theta, yarn=yarn))
    torch.testing.assert_close(rot.cos[0], torch.full((width // 2,), factor))
    torch.testing.assert_close(torch.atan2(rot.sin[1], rot.cos[1]), frequencies, rtol=1e-5, atol=0)


def dtypes_in_a_block(cfg: ModelConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of an attention layer's input and of its angles, on a mesh that computes in BF16."""
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import materialize, parallelize

    model = meta_model(cfg)
    parallelize(model, build_meshes(resolve_degrees(MeshConfig(), 2), "cpu"), PrecisionConfig(compute=Compute.bf16))
    materialize(model, "cpu", seed=0)
    seen = []
    attention = model.layers[0].attention
    attention.register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1].rotation.cos.dtype)))
    model(batch(1, 4))
    return seen[0]


def test_the_angles_stay_fp32_in_a_block_that_computes_in_bf16() -> None:
    """FSDP casts the floats that it finds in a block's inputs."""
    assert run_distributed(dtypes_in_a_block, 2, tiny_config()) == [(torch.bfloat16, torch.float32)] * 2
