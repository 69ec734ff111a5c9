"""A model family: its config there and here, and the pieces that make up the tensors of both."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from moefoundry.config import (
    REQUIRED,
    BalanceConfig,
    ConfigError,
    GqaConfig,
    ModelConfig,
    MoEConfig,
    Problem,
    ScoreFunction,
)
from moefoundry.config.attention_rules import EXTENSIONS
from moefoundry.config.checks import check_model
from moefoundry.config.field import MAX_FACTOR
from moefoundry.config.schema_linear_attention import INTERVAL_OF_FULL
from moefoundry.config.spec import architecture_of, specs
from moefoundry.conversion.families.keys import Keys

LOSSES = ("router_aux_loss_coef", "aux_loss_alpha")
"""Keys of the weight of a balance loss, which :meth:`Family.balance` takes from the file."""


@dataclass(frozen=True)
class Piece:
    """A block of one of our tensors that equals a block of one Hugging Face tensor, bit for bit.

    It is ``ours[expert][our_rows] == theirs[part][rows]``, of which ``columns`` are taken and then ``transposed``.

    Attributes:
        name: Our parameter or buffer, as in ``MoETransformer.state_dict()``.
        hf_name: Tensor of the Hugging Face checkpoint.
        expert: Index along our first dim, where experts are stacked; None is the whole tensor.
        rows: First row and the row behind the last of the Hugging Face tensor; None is the whole tensor.
        transposed: True where the two-dimensional block is stored transposed there.
        part: Index along the Hugging Face tensor's first dim, where it has a dim more than our block, and ``rows`` are
            those of this part; None is a tensor of as many dims.
        our_rows: First row and the row behind the last of our tensor, where it is not all of it.
        columns: First column, and the step to the next, of the block in the last dim of the Hugging Face tensor, whose
            other columns are other pieces with equal ``rows``; None is all.
    """

    name: str
    hf_name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    part: int | None = None
    our_rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def of_their_block(self, block: Any) -> Any:
        """Take our block of the rows of a tensor of theirs, a view."""
        if self.columns is not None:
            first, step = self.columns
            block = block[..., first::step]
        return block.T if self.transposed else block


class Family(ABC):
    """Family of models with one ``model_type`` of Hugging Face.

    Attributes:
        name: The ``model_type``.
        architecture: Class that ``AutoModelForCausalLM`` loads.
        attention_kind: Its ``model.attention.kind``.
        defaults: Values of transformers for options that a config leaves out. Sizes have no default here.
        length_key: Key of the tokens of a sequence.
        names_in_memory: Parts of tensors' names that transformers 5 changes in memory, as the files may be saved: part
            of the published name -> part of the other. Experts in one tensor each layer are known beside these.
        stand_in: Family under whose name transformers has a model that computes the same, where it has none of this.
        absent: Parts of the published models that are not here, for the table of families.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    attention_kind: ClassVar[str] = "gqa"
    defaults: ClassVar[dict[str, Any]]
    length_key: ClassVar[str] = "max_position_embeddings"
    names_in_memory: ClassVar[dict[str, str]] = {}
    stand_in: ClassVar[str] = ""
    absent: ClassVar[str] = ""

    @property
    def published(self) -> tuple[str, dict[str, Any]]:
        """Name of a model of the family, and the part of its ``config.json`` that says the architecture."""
        name, hf = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))[self.name]
        return name, hf

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model that a ``config.json`` declares.

        Keys that only training reads keep the recipe's defaults, but for ``init.std`` and the router's jitter, which
        such a file has.

        Raises:
            ConfigError: Names every key whose value means something that this project does not compute.
        """
        keys = Keys(hf, self.defaults, f"Hugging Face config ({self.name})")
        cfg = self._read(keys)
        if keys.has(self.length_key):
            keys.size(self.length_key)
        for weight in LOSSES:
            if keys.has(weight) and keys.number(weight) > MAX_FACTOR:
                keys.refuse(weight, f"at most {MAX_FACTOR:g}")
        if keys.has("quantization_config"):  # of the file's tensors, which ``safetensors_io`` reads
            keys.nested("quantization_config", {}).text("quant_method", "fp8", "compressed-tensors", "mxfp4")
        keys.finish()
        return cfg

    def model_of(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model of a ``config.json``, checked as a recipe's is; how its files are quantized is not read.

        Raises:
            ConfigError: As :meth:`read_config`; or names the keys of the model whose values, or relations, are none.
        """
        cfg = self.read_config({key: value for key, value in hf.items() if key != "quantization_config"})
        if problems := check_model(cfg):
            raise ConfigError(problems, f"Hugging Face config ({self.name}), as a recipe's model")
        return cfg

    def max_seq_len(self, hf: Mapping[str, Any]) -> int | None:
        """Return the tokens of a sequence in a ``config.json``; None where it does not say."""
        return hf.get(self.length_key)

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Load balancing that the family's models were trained with, in this project's terms.

        Losses here are sums over layers and means over a token's choices.

        Args:
            cfg: The model.
            hf: Its ``config.json``, for the weight of the loss.
        """
        return BalanceConfig()

    def write_config(self, cfg: ModelConfig, max_seq_len: int, torch_dtype: str = "bfloat16") -> dict[str, Any]:
        """Make a ``config.json`` for ``AutoModelForCausalLM``. It names no special tokens: those are the tokenizer's.

        Args:
            cfg: The model.
            max_seq_len: Tokens of a sequence. With YaRN the file says ``factor * original_max_seq_len`` instead, since
                transformers takes the factor from the ratio of the two.
            torch_dtype: Name of the dtype of the tensors beside it.

        Raises:
            ConfigError: The family does not have such a model.
        """
        self.check(cfg)
        yarn = cfg.attention.yarn
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "torch_dtype": torch_dtype,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            self.length_key: round(yarn.factor * yarn.original_max_seq_len) if yarn else max_seq_len,
        } | self._write(cfg)

    def check(self, cfg: ModelConfig) -> None:
        """Check that the family has such a model.

        Raises:
            ConfigError: It has not; the problems are those of :meth:`fits`.
        """
        if problems := self.fits(cfg):
            raise ConfigError([Problem(*text.split(": ", 1)) for text in problems], f"model as {self.name}")

    def fits(self, cfg: ModelConfig) -> list[str]:
        """List the reasons why a model cannot be one of this family; empty where it can.

        The round trip decides: a model does not come back with what the family's config cannot say.
        """
        if cfg.attention.kind != self.attention_kind:
            return [f"model.attention.kind: {cfg.attention.kind}, and {self.name} has {self.attention_kind}"]
        ours, theirs = _leaves(computed(cfg)), _leaves(computed(self.read_config(self._write(cfg))))
        problems = [
            f"model.{path}: {value}, and {self.name} has {theirs.get(path)}"
            for path, value in ours.items()
            if theirs.get(path) not in (REQUIRED, value)  # required: experts, which a dense family lacks
            and (path, theirs.get(path)) != ("ffn_hidden_size", None)  # has no dense block
        ]
        yarn = cfg.attention.yarn
        if yarn is not None and not (yarn.factor * yarn.original_max_seq_len).is_integer():
            problems.append(
                f"model.attention.yarn.factor: {yarn.factor}, and transformers takes the ratio of two whole lengths; "
                f"times original_max_seq_len {yarn.original_max_seq_len} it is none"
            )
        return problems

    @abstractmethod
    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        """Yield blocks that cover every tensor of both sides, each exactly once.

        Exceptions are :meth:`copies`, and a tied ``lm_head.weight``, which is ``embed_tokens.weight``.
        """

    def copies(self, cfg: ModelConfig) -> dict[str, str]:
        """Map tensors that repeat another to it; a checkpoint there may hold them, or leave them out."""
        return {}

    def left_out(self, cfg: ModelConfig) -> dict[str, str]:
        """Map beginnings of tensors' names that are not read, of parts that are not here, to the part."""
        return {}

    def prediction_depth(self, cfg: ModelConfig, tensors: Iterable[str]) -> int:
        """Count the modules of multi-token prediction that a checkpoint with these tensors holds."""
        there = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
        behind = [int(index) - cfg.n_layers for index in there if index.isdecimal()]
        return max((place + 1 for place in behind if 0 <= place < cfg.mtp.depth), default=0)

    def unused_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors that transformers has for parts that such a model lacks.

        They are read by nothing, as of shared experts of width 0; zeros are written, where they have elements. A
        checkpoint there may leave them out, of which transformers warns.
        """
        return {}

    @abstractmethod
    def _read(self, keys: Keys) -> ModelConfig: ...

    @abstractmethod
    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        """Write the keys that ``_read`` reads; for a model that does not fit, as much as the family has."""


def loss_weight(hf: Mapping[str, Any], key: str, default: float) -> float:
    """Read the weight of a balance loss; null counts as absent."""
    value = hf.get(key)
    return default if value is None else float(value)


def ffn_width(cfg: ModelConfig) -> int:
    """Hidden width of the dense FFN; where no block has one, that at which it would cost what an MoE block does."""
    return cfg.ffn_hidden_size or cfg.moe.expert_hidden_size * (cfg.moe.top_k + cfg.moe.num_shared_experts)


def dense_layers(cfg: ModelConfig) -> list[int]:
    """List the indices of the blocks with a dense FFN, in order."""
    return [i for i in range(cfg.n_layers) if cfg.is_dense(i)]


def with_dense_layers(cfg: ModelConfig, dense: list[int]) -> ModelConfig:
    """Set the dense blocks, in the recipe's shortest form: the first n, and the others by index.

    Where there is none, their width is null.
    """
    first = next(n for n, index in enumerate([*dense, -1]) if n != index)
    width = cfg.ffn_hidden_size if dense else None
    return replace(cfg, n_dense_layers=first, dense_layers=dense[first:], ffn_hidden_size=width)


def computed(cfg: ModelConfig) -> ModelConfig:
    """Reduce a config to what the model computes.

    Keys with two spellings have one of them, and keys that no layer reads their defaults. Of the balance it keeps
    whether there is an expert bias.
    """
    dense = dense_layers(cfg)
    always_biased = cfg.moe.router.score_function == ScoreFunction.sigmoid  # with softmax, where the bias is updated
    bias = BalanceConfig(bias_update_rate=0.0 if always_biased else cfg.moe.balance.bias_update_rate)
    cfg = architecture_of(cfg)
    moe = replace(cfg.moe, balance=bias)
    attention = cfg.attention
    if isinstance(attention, GqaConfig):
        width = attention.head_width(cfg.d_model)
        attention = replace(
            with_fewest_window_keys(attention, cfg.n_layers),
            head_dim=width,
            softmax_scale=attention.softmax_scale or width**-0.5,
            unrotated_layers=sorted(attention.unrotated_layers),
        )
    linear = cfg.linear_attention
    if linear is not None:
        layers = [index for index in range(cfg.n_layers) if linear.is_linear(index)]
        linear = replace(linear, layers=layers, full_attention_interval=INTERVAL_OF_FULL) if layers else None
    return replace(
        with_dense_layers(cfg, dense),
        linear_attention=linear,
        moe=moe if len(dense) < cfg.n_layers or cfg.mtp.depth else MoEConfig(),
        attention=attention,
    )


def with_fewest_window_keys(attention: GqaConfig, n_layers: int) -> GqaConfig:
    """Set the keys of windows in the recipe's shortest form: no list of blocks or rotary embedding without need."""
    blocks = [index for index in range(n_layers) if attention.window_of(index) is not None]
    if not blocks:
        return replace(attention, sliding_window=None, sliding_window_layers=None, sliding_window_rope_theta=None)
    rope = attention.rope_of(attention.sliding_window)
    own = {name: getattr(rope, name) for name in ("rope_theta", *EXTENSIONS)}
    if len(blocks) == n_layers:
        return replace(attention, sliding_window_layers=None, sliding_window_rope_theta=None, **own)
    same = all(getattr(attention, name) == value for name, value in own.items())
    theta = None if same else attention.sliding_window_rope_theta
    return replace(attention, sliding_window_layers=blocks, sliding_window_rope_theta=theta)


def _leaves(value: Any, prefix: str = "") -> dict[str, object]:
    """Map the path of every key that is no mapping to its value."""
    found: dict[str, object] = {}
    for name in specs(type(value)):
        own = getattr(value, name)
        if hasattr(own, "__dataclass_fields__"):
            found |= _leaves(own, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = own
    return found
