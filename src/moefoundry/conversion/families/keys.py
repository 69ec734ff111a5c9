"""Reader of a Hugging Face ``config.json`` that passes over no key in silence.

A key is read, or must have the one value that this project computes with, or is listed here as one that does not change
what the model computes. Any other is an error: an ignored option could give another model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from moefoundry.config import ConfigError, Problem

# About training, generation, files, other tools or speed. `max_position_embeddings` bounds no computation: rotary
# embeddings do not end. The balance loss is the recipe's to decide.
INERT = frozenset(
    {
        *("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("use_cache", "use_bfloat16", "pretraining_tp", "ep_size", "chunk_size_feed_forward", "_commit_hash"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "use_flash_attn"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("max_position_embeddings", "max_seq_len", "model_max_length", "tokenizer_class", "prefix"),
        *("output_router_logits", "router_aux_loss_coef", "moe_loss_weight", "aux_loss_alpha", "seq_aux"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("return_dict", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
        *("unsloth_version", "unsloth_fixed", "torchscript", "tf_legacy_loss", "is_decoder", "pruned_heads"),
        *("max_length", "min_length", "do_sample", "early_stopping", "temperature", "top_p", "typical_p"),
        *("num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "remove_invalid_values"),
    }
)
# What transformers writes into every mapping of a file that is a config of its own, whatever the mapping is about.
GENERIC = INERT | {"tie_word_embeddings", "tie_encoder_decoder", "top_k"}
ONLY_DECODER = ("is_encoder_decoder", "add_cross_attention")
MOST = 2**31 - 1  # of what an integer counts, in any model
MOST_OF = dict.fromkeys(("num_hidden_layers", "n_layers", "index_n_heads"), 10_000)  # which are listed one by one


class Keys:
    """Keys of one mapping. Problems are collected; :meth:`finish` raises them together.

    A value that is not sound is a problem and reads as 1, so that reading can go on. ``null`` counts as absent.

    Args:
        config: The mapping.
        defaults: Values of keys that it leaves out.
        source: Name of the file, for the error.
        path: Path of the mapping, where it is not the whole file.
        inert: Keys that do not change what is computed.
        problems: List to add problems to.
        advice: What to do about keys that are refused, for the error.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        source: str,
        path: str = "",
        inert: frozenset[str] = INERT,
        problems: list[Problem] | None = None,
        advice: str = "",
    ) -> None:
        self._stated = {key for key, value in config.items() if value is not None}
        self._values = {key: value for key, value in {**defaults, **config}.items() if value is not None}
        self._unread = set(self._values) - inert
        self._source, self._path, self._advice = source, path, advice
        self._problems: list[Problem] = [] if problems is None else problems

    def has(self, key: str) -> bool:
        """Tell if the key is there, or has a default."""
        return key in self._values

    def stated(self, key: str) -> bool:
        """Tell if the key is there."""
        return key in self._stated

    def is_value(self, key: str, value: object) -> bool:
        """Tell if the key has this value, without reading it."""
        return self._values.get(key) == value

    def take(self, key: str, allowed: str, sound: Callable[[Any], bool]) -> Any:
        """Read a value that is ``sound``; ``allowed`` says what that is."""
        self._unread.discard(key)
        if key not in self._values:
            self._problems.append(Problem(f"{self._path}{key}", "missing", allowed))
            return 1
        if not sound(self._values[key]):
            self.refuse(key, allowed)
            return 1
        return self._values[key]

    def size(self, key: str) -> int:
        """Read an integer of at least 1, up to :data:`MOST_OF` the key."""
        most = MOST_OF.get(key, MOST)
        return self.take(key, _integer(1, most), lambda v: _is_integer(v, 1, most))

    def size_of_each(self, key: str) -> int:
        """Read an integer of at least 1, or a list that has it for each block."""
        value: Any = self.take(
            key,
            "an integer of at least 1, the same in each block",
            lambda v: _is_integer(v[0]) and v == v[:1] * len(v) if isinstance(v, list) and v else _is_integer(v),
        )
        return int(value[0]) if isinstance(value, list) else int(value)

    def count(self, key: str) -> int:
        """Read an integer of at least 0."""
        return self.take(key, _integer(0), lambda v: _is_integer(v, 0))

    def number(self, key: str) -> float:
        """Read a number of at least 0."""
        return float(self.take(key, "a number of at least 0", _is_number))

    def numbers(self, key: str) -> list[float]:
        """Read a list of numbers above 0."""
        value = self.take(
            key,
            "a list of numbers above 0",
            lambda v: isinstance(v, list) and all(_is_number(x) and x > 0 for x in v),
        )
        return [float(x) for x in value] if isinstance(value, list) else []

    def flag(self, key: str) -> bool:
        """Read a boolean."""
        return bool(self.take(key, "true or false", lambda v: isinstance(v, bool)))

    def text(self, key: str, *allowed: str) -> str | None:
        """Read one of these strings; return None for any other."""
        value = self.take(key, ", ".join(allowed), lambda v: v in allowed)
        return value if isinstance(value, str) else None

    def indices(self, key: str) -> list[int]:
        """Read a list of indices, from 0."""
        allowed = "a list of integers of at least 0"
        value = self.take(key, allowed, lambda v: isinstance(v, list) and all(_is_integer(i, 0) for i in v))
        return value if isinstance(value, list) else []

    def texts(self, key: str, *allowed: str) -> list[str]:
        """Read a list of these strings."""
        text = f"a list of {', '.join(allowed)}"
        value = self.take(key, text, lambda v: isinstance(v, list) and all(each in allowed for each in v))
        return value if isinstance(value, list) else []

    def nested(self, key: str, defaults: Mapping[str, Any], inert: frozenset[str] = INERT) -> Keys:
        """Open the mapping under ``key``, over ``defaults``; :meth:`finish` it too."""
        self._unread.discard(key)
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "a mapping")
            value = {}
        return Keys(value, defaults, self._source, f"{self._path}{key}.", inert, self._problems)

    def alias(self, key: str, other: str) -> None:
        """Take ``other`` for a second name of ``key``: either may be there, or both with one value."""
        if not self.stated(other):
            return
        value = self._values.pop(other)
        self._stated.discard(other)
        self._unread.discard(other)
        if self.stated(key) and self._values[key] != value:
            self._values[other] = value
            self.refuse(other, f"{_text(self._values[key])}, as {self._path}{key} says")
        elif not self.stated(key):
            self._values[key] = value
            self._stated.add(key)
            self._unread.add(key)

    def assume(self, key: str, value: object) -> None:
        """Set the value that ``key`` has in this file if it is left out."""
        if not self.stated(key):
            self._values[key] = value

    def skip(self, *keys: str) -> None:
        """Pass over keys that have no effect, given the others."""
        self._unread.difference_update(keys)

    def only(self, key: str, value: object) -> None:
        """Refuse any value of a key but this one, which the model here has; it may be absent."""
        self._unread.discard(key)
        if self._values.get(key, value) != value:
            self.refuse(key, _text(value))

    def refuse(self, key: str, allowed: str) -> None:
        """Report the value of ``key``."""
        self._problems.append(Problem(f"{self._path}{key}", f"got {_text(self._values.get(key))}", allowed))

    def finish(self) -> None:
        """Report the keys that nothing has read; of the whole file, raise what was found.

        Raises:
            ConfigError: Names each key and its value.
        """
        for key in ONLY_DECODER:
            self.only(key, False)
        for key in sorted(self._unread):
            message = f"got {_text(self._values[key])}, and this key is not known here: it may change what is computed"
            self._problems.append(Problem(f"{self._path}{key}", message))
        if self._problems and not self._path:
            raise ConfigError(self._problems, self._source, self._advice)


def _is_integer(value: object, least: int = 1, most: int = MOST) -> bool:
    return type(value) is int and least <= value <= most


def _integer(least: int, most: int = MOST) -> str:
    return f"an integer of at least {least}" if most == MOST else f"an integer from {least} to {most}"


def _is_number(value: object) -> bool:
    """Tell if a value is a number of at least 0 that a float holds: neither NaN nor infinite."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max  # type: ignore[operator]


def _text(value: object) -> str:
    """Show a value as in the file, cut to a line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
