"""Continue a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn


@torch.no_grad()
def greedy(
    model: Callable[[Tensor], Tensor], prompt_ids: Tensor, max_new_tokens: int, eos_id: int | None = None
) -> Tensor:
    """The most likely next token, again and again; each step runs the whole sequence.

    With a sharded model every rank must call it with the same prompt, and every rank runs all ``max_new_tokens`` steps
    (they are collective); what follows ``eos_id`` is cut off afterwards.

    Args:
        model: Token ids [1, S] -> logits [1, S, V].
        prompt_ids: int64 [S], at least one.
        max_new_tokens: Tokens to add.
        eos_id: Ends the text.

    Returns:
        The new tokens, int64 [at most max_new_tokens], without ``eos_id``.
    """
    ids = prompt_ids.unsqueeze(0)
    for _ in range(max_new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    new_ids = ids[0, prompt_ids.numel() :]
    if eos_id is not None and (new_ids == eos_id).any():
        new_ids = new_ids[: int((new_ids == eos_id).int().argmax())]
    return new_ids


def complete(model: nn.Module, tokenizer_dir: Path, prompt: str, max_new_tokens: int) -> str:
    """``prompt`` and its greedy continuation, as text. With a sharded model every rank must call it.

    Args:
        model: Token ids [1, S] -> logits [1, S, V]; left in evaluation mode.
        tokenizer_dir: Holds ``tokenizer.json``.
        prompt: At least one token.
        max_new_tokens: Tokens to add.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    prompt_ids = torch.tensor(tokenizer.encode(prompt).ids, device=next(model.parameters()).device)
    return prompt + tokenizer.decode(greedy(model.eval(), prompt_ids, max_new_tokens).tolist())
