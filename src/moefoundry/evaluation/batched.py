"""Forward passes over many sequences: batched, divided among ranks, and independent of both.

Sequences are sorted by length, cut into batches, and batches are dealt to the ranks in turn. So a batch has the same
sequences on every mesh. A rank without a batch runs a dummy, since forward passes of a sharded model are collective.

Scored sequences are padded at their end, where causal attention keeps the padding from all else. In generation there is
no padding: the sequences of a batch begin together, and while the longer prompts are read on, the shorter ones already
grow. No token of evaluation depends on the batch it is routed in: a capacity drops slots in training alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moefoundry.checkpoint.ranks import from_every_rank, rank
from moefoundry.evaluation.generation import Choice, most_likely, turns_anew
from moefoundry.model.cache import KVCache
from moefoundry.model.transformer import MoETransformer

PADDING = -1  # number of the document that padding belongs to
_T = TypeVar("_T")


@dataclass(frozen=True)
class Continuation:
    """Tokens to be scored.

    Attributes:
        context: Tokens before them, at least one.
        tokens: The tokens, at least one.
    """

    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Score:
    """Verdict of a model on a continuation, a value for each token.

    Attributes:
        logprobs: Log-probabilities, nats, fp32.
        likeliest: Tokens that the model finds the likeliest.
        confidences: Their probabilities.
    """

    logprobs: list[float]
    likeliest: list[int]
    confidences: list[float]


@dataclass(frozen=True)
class Prompt:
    """Text to be continued.

    Attributes:
        tokens: At least one.
        max_new_tokens: Tokens to add at most.
        has_ended: Called with the new tokens after each; True ends the text.
        choose: Picks the next token by the logits of the last. It is made for this prompt alone.
    """

    tokens: list[int]
    max_new_tokens: int
    has_ended: Callable[[list[int]], bool]
    choose: Choice = most_likely


class BatchedModel:
    """A model and the size of its batches. Every rank calls each method with the same arguments.

    Args:
        model: Left in evaluation mode; whole or sharded.
        batch_size: Sequences of one forward pass of one rank.
        progress: Show a bar on a terminal.
    """

    def __init__(self, model: MoETransformer, batch_size: int, progress: bool = False) -> None:
        self.model = model.eval()
        self.batch_size = batch_size
        self.progress = progress
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def score(self, continuations: Sequence[Continuation], label: str = "") -> list[Score]:
        """Score continuations; the results are in their order, on every rank."""
        lengths = [len(each.context) + len(each.tokens) for each in continuations]
        scores: dict[int, Score] = {}
        for batch in self._batches(lengths, label):
            rows = [continuations[index] for index in batch]
            ids_BS, documents_BS = self._padded([[*row.context, *row.tokens][:-1] for row in rows])
            logits_BSV = self.model(ids_BS, sequence_id=documents_BS)
            for index, row, logits_SV in zip(batch, rows, logits_BSV, strict=False):
                first = len(row.context) - 1
                scores[index] = _score(logits_SV[first : first + len(row.tokens)], row.tokens)
        return _in_order(scores, len(continuations))

    @torch.no_grad()
    def complete(self, prompts: Sequence[Prompt], label: str = "") -> list[list[int]]:
        """Continue prompts; the new tokens are in the prompts' order, on every rank."""
        texts: dict[int, list[int]] = {}
        for batch in self._batches([len(each.tokens) for each in prompts], label):
            texts.update(zip(batch, self._complete([prompts[index] for index in batch]), strict=True))
        return _in_order(texts, len(prompts))

    def _batches(self, lengths: Sequence[int], label: str) -> Iterator[list[int]]:
        """Yield this rank's batches of indices, as many as every rank has; empty ones among them."""
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))  # what is too large fails first
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        world = dist.get_world_size() if dist.is_initialized() else 1
        hidden = not (self.progress and rank() == 0 and sys.stderr.isatty())
        with tqdm(total=len(lengths), desc=label, leave=False, disable=hidden) as bar:
            for start in range(0, len(batches), world):
                turn = batches[start : start + world]
                yield turn[rank()] if rank() < len(turn) else []
                bar.update(sum(map(len, turn)))

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad rows at their end: ``input_ids`` and ``sequence_id``, both int64 [B, S]."""
        rows = rows or [[0]]
        width = max(map(len, rows))
        ids_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        documents = [[0] * len(row) + [PADDING] * (width - len(row)) for row in rows]
        return ids_BS, torch.tensor(documents, device=self.device)

    def _complete(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Continue the prompts of a batch. Ranks take steps until all have ended."""
        length = min((len(prompt.tokens) for prompt in prompts), default=1)
        cache, texts = KVCache(len(self.model.layers)), [_Text(prompt, length) for prompt in prompts]
        ids = read = [prompt.tokens[:length] for prompt in prompts]
        while self._anyone(not all(text.ended for text in texts)):
            if all(text.ended for text in texts):  # of this rank
                ids, read, cache = [[0]], [[0]], KVCache(len(self.model.layers))
            elif turns_anew(self.model.cfg, cache):
                ids, cache = read, KVCache(len(self.model.layers))
            logits_BV = self.model(torch.tensor(ids, device=self.device), cache=cache)[:, -1]
            likeliest = logits_BV.argmax(dim=-1).tolist()  # of all at once: the host waits for the device
            ids = [[text.step(*each)] for text, *each in zip(texts, logits_BV, likeliest, strict=False)]
            read = [[*row, *new] for row, new in zip(read, ids, strict=False)]
        return [text.new for text in texts]

    def _anyone(self, goes_on: bool) -> bool:
        if not dist.is_initialized():
            return goes_on
        flag = torch.tensor(int(goes_on), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


class _Text:
    """A prompt that grows, of which the model has read ``length`` tokens."""

    def __init__(self, prompt: Prompt, length: int) -> None:
        self.prompt = prompt
        self.length = length
        self.new: list[int] = []
        self.ended = prompt.max_new_tokens < 1

    def step(self, logits_V: Tensor, likeliest: int) -> int:
        """Give the token that the model reads next: of the prompt, or else of its own; any once the text has ended."""
        self.length += 1
        if self.length <= len(self.prompt.tokens):
            return self.prompt.tokens[self.length - 1]
        if self.ended:
            return 0
        choose = self.prompt.choose
        self.new.append(likeliest if choose is most_likely else int(choose(logits_V)))
        self.ended = len(self.new) == self.prompt.max_new_tokens or self.prompt.has_ended(self.new)
        return self.new[-1]


def _score(logits_NV: Tensor, tokens: list[int]) -> Score:
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    best = logprobs_NV.max(dim=-1)
    tokens_N1 = torch.tensor(tokens, device=logits_NV.device).unsqueeze(1)
    return Score(
        logprobs_NV.gather(1, tokens_N1).squeeze(1).tolist(), best.indices.tolist(), best.values.exp().tolist()
    )


def _in_order(mine: dict[int, _T], count: int) -> list[_T]:
    """Gather what the ranks have, by index."""
    found = {index: value for each in from_every_rank(mine) for index, value in each.items()}
    return [found[index] for index in range(count)]
