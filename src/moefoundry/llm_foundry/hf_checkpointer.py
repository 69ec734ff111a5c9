"""``callbacks: {hf_checkpointer: ...}`` of a recipe of LLM Foundry, which finds it by the entry points of this package.

LLM Foundry's own saves models that are ``HuggingFaceModel``. Of ``moe_causal_lm`` the same keys write a directory of
the family that the model is of, which ``AutoModelForCausalLM`` loads without the code of this package.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist
from llmfoundry.callbacks.hf_checkpointer import HuggingFaceCheckpointer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import ShardValues, row_ranges
from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.convert import export_hf, write_weights
from moefoundry.conversion.families import holder_of
from moefoundry.conversion.tensor_map import Dtype
from moefoundry.foundry import FoundryMoECausalLM


class AnyModelCheckpointer(HuggingFaceCheckpointer):
    """LLM Foundry's ``hf_checkpointer``, which also takes ``moe_causal_lm``.

    Raises:
        UserError: When the trainer is made: no family of Hugging Face holds the model, or it is to be registered.
    """

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        model = model_of(state)
        if event != Event.INIT or not isinstance(model, FoundryMoECausalLM):
            super().run_event(event, state, logger)
            return
        holder_of(model.model.cfg)
        if self.mlflow_registered_model_name is not None:
            message = "moe_causal_lm is saved, and not registered with MLflow; leave it out"
            raise UserError(f"callbacks.hf_checkpointer.mlflow_registered_model_name: {message}")
        self.using_peft = False
        if self.remote_ud is not None:
            self.remote_ud.init(state, logger)
            state.callbacks.append(self.remote_ud)

    def _get_hf_model(self, state: State) -> Any:
        model = model_of(state)
        if not isinstance(model, FoundryMoECausalLM):
            return super()._get_hf_model(state)
        self.last_checkpoint_batch = state.timestamp.batch
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors: dict[str, Any] = get_model_state_dict(model.model, options=options)
        if dist.get_global_rank() != 0:
            return None, model.tokenizer
        dtype = {torch.float32: Dtype.fp32, torch.bfloat16: Dtype.bf16}.get(self.dtype)
        if dtype is None:
            raise UserError("callbacks.hf_checkpointer.precision: moe_causal_lm is saved as float32 or bfloat16")
        return Exported(model.model.cfg, tensors, dtype), model.tokenizer


def model_of(state: State) -> Any:
    """Return the model of a trainer, without the wrapper of data parallelism."""
    return state.model.module if state.is_model_ddp else state.model


@dataclass
class Exported:
    """Model as LLM Foundry's checkpointer saves it.

    Attributes:
        cfg: The model.
        tensors: All its parameters and buffers.
        dtype: Dtype of the saved parameters.
    """

    cfg: ModelConfig
    tensors: dict[str, Tensor]
    dtype: Dtype

    @property
    def config(self) -> SimpleNamespace:
        """The part of a Hugging Face configuration that is asked for."""
        return SimpleNamespace(model_type=holder_of(self.cfg)[0].name)

    def save_pretrained(self, directory: str, max_shard_size: str) -> None:
        """Write a Hugging Face directory without a tokenizer; shards have this package's size."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exported-") as scratch:
            weights = Path(scratch, "weights")
            weights.mkdir()
            write_weights(weights, self.cfg, specs, self._shards(specs), None)
            export_hf(weights, Path(scratch, "hf"), dtype=self.dtype)
            for path in Path(scratch, "hf").iterdir():
                shutil.move(path, target / path.name)

    def _shards(self, specs: dict[str, TensorSpec]) -> Iterator[ShardValues]:
        for name, spec in specs.items():
            if not spec.shape:
                yield ShardValues(name, (), self.tensors[name])
                continue
            for start, end in row_ranges(spec):
                yield ShardValues(name, (start,) + (0,) * (len(spec.shape) - 1), self.tensors[name][start:end])
