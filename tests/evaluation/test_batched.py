"""Batches of sequences of any lengths: what each sequence gives by itself."""

from __future__ import annotations

import pytest
import torch

from moefoundry.config import AttentionConfig, GqaConfig, LongRopeConfig, MlaConfig
from moefoundry.evaluation.batched import BatchedModel, Continuation, Prompt
from moefoundry.evaluation.generation import Sampling, generate, greedy
from moefoundry.model.transformer import MoETransformer
from tests.model.tiny import batch, tiny_config, tiny_model

MLA = MlaConfig(
    n_heads=4, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=5, rope_theta=100.0
)
KINDS = {
    "gqa": GqaConfig(n_heads=4, n_kv_heads=2),
    "window": GqaConfig(n_heads=4, n_kv_heads=2, sliding_window=4),
    "mla": MLA,
    "longrope": GqaConfig(n_heads=4, n_kv_heads=2, longrope=LongRopeConfig(8, [1.0] * 4, [1.0, 3.0, 9.0, 40.0])),
}
LENGTHS = (3, 9, 1, 6, 6)
kinds = pytest.mark.parametrize("attention", KINDS.values(), ids=KINDS.keys())


def model(attention: AttentionConfig, document_masking: bool = False) -> MoETransformer:
    cfg = tiny_config(std=0.3)
    cfg.attention, cfg.document_masking = attention, document_masking
    cfg.moe.capacity_factor = 0.5  # which counts in training alone
    return tiny_model(cfg).eval()


def tokens(length: int, seed: int) -> list[int]:
    return batch(1, length, seed)[0].tolist()


@kinds
@pytest.mark.parametrize("document_masking", [False, True], ids=["", "documents"])
@torch.no_grad()
def test_scores_are_those_of_each_sequence(attention: AttentionConfig, document_masking: bool) -> None:
    rows = [Continuation(tokens(length, seed), tokens(1 + seed, 9 - seed)) for seed, length in enumerate(LENGTHS)]
    plain = model(attention)
    for size in (1, 2, 5):
        scores = BatchedModel(model(attention, document_masking), size).score(rows)
        for row, score in zip(rows, scores, strict=True):
            logits = plain(torch.tensor([[*row.context, *row.tokens]]))[0, len(row.context) - 1 : -1]
            expected = logits.log_softmax(-1)[torch.arange(len(row.tokens)), row.tokens]
            torch.testing.assert_close(torch.tensor(score.logprobs), expected, rtol=0, atol=1e-5)
            assert score.likeliest == logits.argmax(-1).tolist()
            torch.testing.assert_close(torch.tensor(score.confidences), logits.softmax(-1).amax(-1))
    assert BatchedModel(plain, 2).score([]) == []


@kinds
def test_texts_are_those_of_each_prompt(attention: AttentionConfig) -> None:
    prompts = [tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    numbers = [5, 0, 9, 3, 7]
    plain = model(attention)
    expected = [greedy(plain, torch.tensor(prompt), 9).tolist() for prompt in prompts]
    end = expected[4][3]
    for size in (1, 3, 5):
        rows = [
            Prompt(prompt, number, lambda new: new[-1] == end) for prompt, number in zip(prompts, numbers, strict=True)
        ]
        for text, number, full in zip(BatchedModel(plain, size).complete(rows), numbers, expected, strict=True):
            wanted = full[:number]
            assert text == (wanted[: wanted.index(end) + 1] if end in wanted else wanted)


def test_draws_are_those_of_each_prompt() -> None:
    plain = model(KINDS["gqa"])
    prompts = [tokens(length, seed) for seed, length in enumerate(LENGTHS)]

    def draws(seed: int) -> Sampling:
        return Sampling(temperature=1.5, seed=seed)

    rows = [Prompt(prompt, 8, lambda new: False, draws(seed).choice()) for seed, prompt in enumerate(prompts)]
    texts = BatchedModel(plain, 4).complete(rows)
    alone = [
        list(generate(plain, torch.tensor(prompt), 8, draws(seed).choice())) for seed, prompt in enumerate(prompts)
    ]
    assert texts == alone
    assert len({tuple(text) for text in texts}) == len(texts)
