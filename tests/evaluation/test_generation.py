"""Generation: transformers' greedy tokens and sampling distributions, on one rank and on several."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moefoundry.config import GqaConfig, MeshConfig, MlaConfig, PrecisionConfig
from moefoundry.evaluation.generation import Sampling, complete, generate, greedy
from moefoundry.model.transformer import MoETransformer
from tests.distributed import run_distributed
from tests.model.peers import deepseek_v3, llama, mixtral
from tests.model.tiny import VOCAB, batch, meta_model, tiny_config, tiny_model

PROMPT = batch(1, 6)[0]
MLA = MlaConfig(
    n_heads=4, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=5, rope_theta=100.0
)
PEERS = {
    "llama": (llama, GqaConfig(n_heads=4, n_kv_heads=2)),
    "mixtral": (mixtral, GqaConfig(n_heads=4, n_kv_heads=2)),
    "mixtral_window": (mixtral, GqaConfig(n_heads=4, n_kv_heads=2, sliding_window=4)),
    "deepseek_v3": (deepseek_v3, MLA),
}


def model() -> MoETransformer:
    return tiny_model(tiny_config(std=0.3)).eval()


@pytest.mark.parametrize(("build", "attention"), PEERS.values(), ids=PEERS.keys())
def test_greedy_tokens_equal_transformers(build, attention) -> None:
    ours, theirs = build(attention)
    expected = theirs.generate(PROMPT[None], max_new_tokens=24, do_sample=False)[0, len(PROMPT) :]
    assert len(set(expected.tolist())) > 4, "a text that repeats itself would tell little"
    assert greedy(ours, PROMPT, 24).tolist() == expected.tolist()


def test_greedy_is_the_uncached_argmax_again_and_again() -> None:
    ids = PROMPT[None]
    for _ in range(10):
        ids = torch.cat([ids, model()(ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert greedy(model(), PROMPT, 10).tolist() == ids[0, 6:].tolist()


def test_text_ends_before_the_end_token() -> None:
    tokens = greedy(model(), PROMPT, 8)
    end = tokens.tolist().index(tokens[4])
    assert greedy(model(), PROMPT, 8, end_ids={int(tokens[4])}).tolist() == tokens[:end].tolist()
    assert greedy(model(), PROMPT, 8, end_ids=[-1, *tokens[3:].tolist()]).tolist() == tokens[:3].tolist(), "any of them"
    assert greedy(model(), PROMPT, 0).tolist() == []


def test_every_step_is_run_so_that_ranks_stay_together_and_each_token_once() -> None:
    lengths = []
    counted = model()
    counted.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    first = int(greedy(counted, PROMPT, 1))
    lengths.clear()
    assert greedy(counted, PROMPT, 5, end_ids={first}).tolist() == []
    assert lengths == [6, 1, 1, 1, 1]


def sampled(**options: object) -> list[int]:
    return list(generate(model(), PROMPT, 16, Sampling(**options).choice()))


def test_sampling_is_decided_by_its_seed() -> None:
    assert sampled(seed=3) == sampled(seed=3)
    assert sampled(seed=3) != sampled(seed=4)
    assert all(0 <= token < VOCAB for token in sampled())


def test_one_candidate_is_greedy() -> None:
    expected = greedy(model(), PROMPT, 16).tolist()
    assert sampled(top_k=1) == sampled(top_p=1e-6) == sampled(temperature=1e-4) == expected
    assert sampled(temperature=0.0) == sampled(temperature=0.0, top_k=5, seed=2) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, VOCAB, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
def test_probabilities_equal_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    warpers = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else [])]
    expected = logits[None]
    for warper in [*warpers, TopPLogitsWarper(top_p)]:
        expected = warper(None, expected)
    probabilities = Sampling(temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(probabilities, expected.softmax(-1)[0])


def test_draws_follow_the_probabilities() -> None:
    choose = Sampling(top_k=3, seed=1).choice()
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    counts = torch.bincount(torch.stack([choose(logits) for _ in range(4000)]), minlength=4)
    expected = torch.tensor([0.0, *torch.tensor([1.0, 2.0, 3.0]).softmax(0)])
    assert counts[0] == 0
    assert (counts / 4000 - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard errors at most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**options)


def test_complete_continues_the_prompts_text(tiny_corpus: Path) -> None:
    cfg = tiny_config()
    cfg.vocab_size = 384
    text = complete(tiny_model(cfg), tiny_corpus / "tokenizer", "def first", 5)
    assert text.startswith("def first")
    assert len(text) > len("def first")


def tokens_on_mesh(sizes: tuple[int, int, int]) -> list[int]:
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import materialize, parallelize

    sharded = meta_model(tiny_config(std=0.3))
    parallelize(sharded, build_meshes(resolve_degrees(MeshConfig(*sizes), 2), "cpu"), PrecisionConfig())
    materialize(sharded, "cpu", seed=0)
    tokens: Tensor = greedy(sharded.eval(), PROMPT, 12)
    return tokens.tolist()


@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 2, 2)], ids=["shard", "expert"])
def test_a_sharded_model_generates_the_same(sizes: tuple[int, int, int]) -> None:
    from moefoundry.parallel import materialize

    single = meta_model(tiny_config(std=0.3))
    materialize(single, "cpu", seed=0)
    expected = greedy(single.eval(), PROMPT, 12).tolist()
    assert run_distributed(tokens_on_mesh, 2, sizes) == [expected, expected]
