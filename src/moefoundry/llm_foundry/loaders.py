"""``train_loader: {name: moefoundry_prepared}`` of a recipe of LLM Foundry, found by this package's entry points."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from composer import DataSpec
from transformers import PreTrainedTokenizerBase

from moefoundry.checkpoint.store import TOKENIZER
from moefoundry.config import ConfigError, Problem, load_recipe
from moefoundry.config.loader import NOT_OF_THE_MODEL
from moefoundry.data.loader import build_loader
from moefoundry.foundry import count_tokens, with_counts


def build_prepared(
    tokenizer: PreTrainedTokenizerBase, device_batch_size: int, document_masking: bool = False, **loader: Any
) -> DataSpec:
    """Build a loader of what ``moefoundry prepare`` has written, with its checks, order and elastic resume.

    Args:
        tokenizer: Tokenizer of the recipe; ids of the data must be below its length.
        device_batch_size: Samples of a batch of this rank.
        document_masking: Batches have a ``sequence_id``, for ``attn_config.attn_uses_sequence_id``.
        loader: Keys of this project's ``train_loader``; ``dataset.max_seq_len`` has no default.

    Raises:
        ConfigError: The keys are not valid.
        UserError: The data are absent, incomplete, too few, or do not fit.
    """
    length = (loader.get("dataset") or {}).get("max_seq_len")
    if length is None:
        raise ConfigError([Problem("dataset.max_seq_len", "missing: length of a sample", "an integer")])
    needed = [text for text in NOT_OF_THE_MODEL if not text.startswith(("max_seq_len", "train_loader"))]
    moe = "{num_experts: 1, top_k: 1, expert_hidden_size: 4}"
    sizes = f"model={{vocab_size: 2, d_model: 4, n_layers: 1, attention: {{n_heads: 1, n_kv_heads: 1}}, moe: {moe}}}"
    try:
        recipe = load_recipe(None, [*needed, sizes, f"max_seq_len={length}", f"train_loader={json.dumps(loader)}"])
    except ConfigError as error:
        raise ConfigError([_in_loader(problem) for problem in error.problems]) from None
    cfg = recipe.train_loader
    built = build_loader(
        cfg,
        batch_size=device_batch_size,
        model_vocab_size=len(tokenizer),
        documents_of=Path(cfg.dataset.local, TOKENIZER) if document_masking else None,
    )
    counting = partial(with_counts, document_masking=document_masking)
    return DataSpec(built, batch_transforms=counting, get_num_tokens_in_batch=count_tokens)


def _in_loader(problem: Problem) -> Problem:
    """Name the key as it stands below a loader of a recipe of LLM Foundry."""
    path = problem.path.removeprefix("train_loader.")
    return Problem(path, problem.message, problem.allowed, problem.suggestion.replace("train_loader.", ""))
