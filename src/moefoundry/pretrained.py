"""Trained models in a Hugging Face directory, a checkpoint, or a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefoundry.checkpoint.fetch import checkpoint_at, directory_at
from moefoundry.checkpoint.manifest import read_state
from moefoundry.checkpoint.weights import Weights, load_model, named_checkpoint, tokenizer_of
from moefoundry.config import UserError
from moefoundry.config.urls import is_url, resolved, url_problem
from moefoundry.conversion.convert import load_hf
from moefoundry.conversion.families import family_of
from moefoundry.conversion.hf_directory import read_hf_config
from moefoundry.data.stores import Remote
from moefoundry.data.tokenizer_files import CONFIG
from moefoundry.evaluation.generation import Choice, generate, most_likely
from moefoundry.evaluation.prompts import NO_TOKENIZER, PromptTokenizer
from moefoundry.mesh import Meshes
from moefoundry.model.transformer import MoETransformer


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Checkpoint in memory.

    Attributes:
        name: Name of its directory, such as ``ba200``.
        model: Model in evaluation mode: ``model(input_ids)`` gives logits [B, S, V].
        recipe: Recipe that it was saved with, as dotted keys; of an imported checkpoint the model's keys alone.
        batch: Number of batches that it was trained for; 0 for one that holds weights alone.
        tokenizer: Tokenizer of the checkpoint or its run; None where there is none.
    """

    name: str
    model: MoETransformer
    recipe: Mapping[str, Any]
    batch: int
    tokenizer: PromptTokenizer | None

    def complete(self, prompt: str, max_new_tokens: int = 128, choose: Choice = most_likely) -> str:
        """Return the prompt and its continuation, up to the end of the text.

        Args:
            prompt: Text of at least one token.
            max_new_tokens: Tokens to add at most.
            choose: Picks the next token; ``Sampling(temperature=0.8).choice()`` draws one.

        Raises:
            UserError: There is no tokenizer, or the prompt has no token.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.name}: {NO_TOKENIZER}")
        prompt_ids = self.tokenizer.encode(prompt)
        new_ids = generate(self.model, prompt_ids.to(next(self.model.parameters()).device), max_new_tokens, choose)
        return prompt + "".join(self.tokenizer.decode_stream(prompt_ids, new_ids))


def from_pretrained(
    place: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> MoETransformer:
    """Load the model at a place, in evaluation mode: ``model(input_ids)`` gives logits [B, S, V].

    Args:
        place: A Hugging Face directory (config.json and safetensors), a checkpoint of this package, or a run (its
            newest checkpoint); a path or a URL.
        dtype: dtype of the parameters; None is fp32. Buffers keep theirs.
        device: Device of the model.
        ema: Take the moving average of the parameters; a checkpoint may hold one.

    Raises:
        UserError: Nothing of the kind is there; or the model is not one of this package; or a tensor is missing, too
            many or misshapen (all are named); or the weights are pickled, or quantized other than in FP8 blocks.
    """
    if not _is_hf(place):
        return load_checkpoint(place, dtype=dtype, device=device, ema=ema).model
    if ema:
        raise UserError(f"{place}: ema is of checkpoints; a Hugging Face directory holds no moving average")
    with directory_at(str(place)) as path:
        return load_hf(path, dtype or torch.float32, device)


def load_checkpoint(
    place: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> LoadedCheckpoint:
    """Load a checkpoint of any mesh, with its recipe and tokenizer.

    Args:
        place: A checkpoint, or a run (its newest); a path or a URL.
        dtype: As in :func:`from_pretrained`.
        device: As in :func:`from_pretrained`.
        ema: As in :func:`from_pretrained`.

    Raises:
        UserError: There is no complete checkpoint, it is damaged, or it lacks the average.
    """
    with checkpoint_at(str(place)) as path:
        checkpoint = named_checkpoint(path)
        state = read_state(checkpoint)
        model = load_model(checkpoint, Weights.ema if ema else Weights.trained).to(device)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or torch.float32)
        directory = tokenizer_of(checkpoint, state["recipe"])
        has_tokenizer = directory is not None and directory.is_dir()  # of another machine's run it may be elsewhere
        tokenizer = PromptTokenizer.open(directory, model.cfg.vocab_size) if directory and has_tokenizer else None
        batch = state["timestamp"]["batch"] if "timestamp" in state else 0
        return LoadedCheckpoint(checkpoint.name, model, state["recipe"], batch, tokenizer)


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to be evaluated, on this rank.

    Attributes:
        name: Directory that it was read from.
        model: Model in evaluation mode, whole or sharded.
        tokenizer: Its tokenizer.
        tokenizer_dir: Directory of the tokenizer.
        checkpoint: Checkpoint that holds it; None for a Hugging Face directory.
        max_positions: Tokens of a sequence at most, as a Hugging Face directory says; None where nothing does.
    """

    name: str
    model: MoETransformer
    tokenizer: PromptTokenizer
    tokenizer_dir: Path
    checkpoint: Path | None
    max_positions: int | None = None


@contextmanager
def evaluated_at(
    place: str, *, meshes: Meshes | None, device: torch.device, ema: bool = False
) -> Iterator[EvaluatedModel]:
    """Load the model at a place with its tokenizer; every rank calls it.

    Args:
        place: As in :func:`from_pretrained`.
        meshes: Meshes to shard the model of a checkpoint on; each rank loads all of a Hugging Face directory.
        device: Device of this rank.
        ema: As in :func:`from_pretrained`.

    Raises:
        UserError: As :func:`from_pretrained`; or there is no tokenizer, or it has tokens that the model lacks.
    """
    if _is_hf(place):
        with directory_at(place) as path:
            model = from_pretrained(path, device=device, ema=ema)
            hf = read_hf_config(path)
            longest = family_of(hf).max_seq_len(hf)
            yield EvaluatedModel(place, model, PromptTokenizer.open(path, model.cfg.vocab_size), path, None, longest)
        return
    with checkpoint_at(place) as path:
        checkpoint = named_checkpoint(path)
        tokenizer = PromptTokenizer.of_checkpoint(checkpoint)
        directory = tokenizer_of(checkpoint, read_state(checkpoint)["recipe"])
        assert directory is not None, "its tokenizer has been opened"
        model = load_model(checkpoint, Weights.ema if ema else Weights.trained, meshes, device)
        yield EvaluatedModel(str(checkpoint), model, tokenizer, directory, checkpoint)


def _is_hf(place: str | Path) -> bool:
    """Tell if a place is a Hugging Face directory.

    Raises:
        UserError: Nothing is there.
    """
    if problem := url_problem(str(place)):
        raise UserError(f"{place}: {problem}")
    where = resolved(str(place))
    if is_url(where):
        return CONFIG in Remote(where).names()
    path = Path(where)
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        raise UserError(
            f"{place}: no such checkpoint, run or Hugging Face directory"
            + (f"; did you mean {path.parent / near[0]}?" if near else "")
            + f" (a model is downloaded first: huggingface-cli download ORGANIZATION/{path.name} --local-dir {path})"
        )
    return (path / CONFIG).is_file()
