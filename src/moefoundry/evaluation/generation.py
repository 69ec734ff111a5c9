"""Continue a prompt, token by token, with a key-value cache.

With a sharded model every rank calls with the same prompt and takes every step. Steps are collective, and ranks may
round otherwise, so they need not see the end of the text at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from moefoundry.config import ModelConfig
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.model.cache import KVCache
from moefoundry.model.transformer import MoETransformer

Choice = Callable[[Tensor], Tensor]
"""Function from logits [V] to the next token, an int64 scalar."""


def most_likely(logits_V: Tensor) -> Tensor:
    """Choose the token of the largest logit."""
    return logits_V.argmax()


@dataclass(frozen=True)
class Sampling:
    """Random choice from the logits after temperature, then top-k, then top-p.

    It is drawn on the CPU in fp32, so that devices agree; the same seed draws the same.

    Attributes:
        temperature: Divisor of the logits; 0 always gives the most likely token.
        top_k: Number of the most likely tokens to draw from; None is all.
        top_p: Probability that the most likely tokens to draw from have together (arXiv 1904.09751).
        seed: Seed of the random numbers.

    Raises:
        ValueError: One of them is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")

    def choice(self) -> Choice:
        """Return a function that draws one token a call; with temperature 0 it is :func:`most_likely`."""
        if self.temperature == 0:
            return most_likely
        generator = torch.Generator().manual_seed(self.seed)
        return lambda logits_V: torch.multinomial(self.probabilities(logits_V), 1, generator=generator)[0]

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Compute the probabilities to draw from: fp32 [V] on the CPU, 0 for the tokens left out."""
        logits_V = logits_V.float().cpu()
        if self.temperature == 0:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        logits_V = logits_V / self.temperature
        if self.top_k is not None and self.top_k < len(logits_V):
            kept = logits_V.topk(self.top_k).indices
            logits_V = torch.full_like(logits_V, -torch.inf).scatter(0, kept, logits_V[kept])
        sorted_probs_V, order_V = logits_V.softmax(0).sort(descending=True, stable=True)
        better_V = sorted_probs_V.cumsum(0) - sorted_probs_V  # what the more likely tokens have together
        sorted_probs_V = sorted_probs_V.masked_fill(better_V >= self.top_p, 0.0)
        return torch.zeros_like(logits_V).scatter(0, order_V, sorted_probs_V / sorted_probs_V.sum())


@torch.no_grad()
def generate(
    model: MoETransformer, prompt_ids: Tensor, max_new_tokens: int, choose: Choice = most_likely
) -> Iterator[int]:
    """Yield ``max_new_tokens`` new tokens, one after the other; an end token does not end them.

    Args:
        model: In evaluation mode.
        prompt_ids: int64 [S], at least one.
        max_new_tokens: Tokens to add.
        choose: Picks the next token by the logits of the last.
    """
    cache = KVCache(len(model.layers))
    ids_BS = all_ids_BS = prompt_ids.unsqueeze(0)
    for _ in range(max_new_tokens):
        if turns_anew(model.cfg, cache):
            cache, ids_BS = KVCache(len(model.layers)), all_ids_BS
        token = choose(model(ids_BS, cache=cache)[0, -1])
        yield int(token)
        ids_BS = token.to(ids_BS.device).view(1, 1)
        all_ids_BS = torch.cat([all_ids_BS, ids_BS], dim=1)


def turns_anew(cfg: ModelConfig, cache: KVCache) -> bool:
    """Tell if the next token makes a text so long that LongRoPE turns its keys otherwise than those in the cache."""
    longrope = cfg.attention.longrope
    return longrope is not None and cache.length == longrope.original_max_seq_len


def greedy(
    model: MoETransformer, prompt_ids: Tensor, max_new_tokens: int, end_ids: Collection[int] = frozenset()
) -> Tensor:
    """Continue with the most likely tokens, up to the first of ``end_ids``.

    Args:
        model: In evaluation mode.
        prompt_ids: int64 [S], at least one.
        max_new_tokens: Tokens to add.
        end_ids: Tokens that end the text.

    Returns:
        The new tokens, int64 [at most max_new_tokens], without an end token.
    """
    new_ids = list(generate(model, prompt_ids, max_new_tokens))  # every step: ranks stay together
    return prompt_ids.new_tensor(list(takewhile(lambda token: token not in end_ids, new_ids)))


def complete(model: MoETransformer, tokenizer_dir: Path, prompt: str, max_new_tokens: int) -> str:
    """Return ``prompt`` and its greedy continuation up to an end token. With a sharded model every rank must call it.

    Args:
        model: Left in evaluation mode.
        tokenizer_dir: Holds ``tokenizer.json``.
        prompt: At least one token.
        max_new_tokens: Tokens to add.

    Raises:
        UserError: The tokenizer is unreadable or has tokens that the model has not, or the prompt has none.
    """
    tokenizer = PromptTokenizer.open(tokenizer_dir, model.cfg.vocab_size)
    prompt_ids = tokenizer.encode(prompt)
    new_ids = greedy(model.eval(), prompt_ids.to(next(model.parameters()).device), max_new_tokens)
    return prompt + "".join(tokenizer.decode_stream(prompt_ids, new_ids.tolist()))
