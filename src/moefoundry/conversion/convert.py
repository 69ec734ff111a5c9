"""Lossless conversion between checkpoints here and Hugging Face directories.

    import       HF directory  -> weights-only checkpoint, which a run's ``load_path`` may name
    export       checkpoint    -> HF directory, which ``AutoModelForCausalLM`` loads
    consolidate  checkpoint    -> safetensors with our names

Everything is checked before anything is written, what is written gets its final name when it is complete, and nothing
is overwritten. Memory is needed for a block (see ``tensor_map.py``), whatever the model's size.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.manifest import WEIGHTS_ONLY, read_state
from moefoundry.checkpoint.out_of_core import ShardValues, StoredTensors, write_shards
from moefoundry.checkpoint.store import TOKENIZER, using
from moefoundry.checkpoint.weights import (
    PREFIX,
    Weights,
    load_model,
    named_checkpoint,
    read_model_config,
    stored_names,
    tokenizer_of,
)
from moefoundry.config import ModelConfig, Recipe, UserError, flatten
from moefoundry.config.versions import VERSION_KEY
from moefoundry.conversion.families import FAMILIES, Family, family_for
from moefoundry.conversion.hf_directory import HfDirectory, open_hf
from moefoundry.conversion.parity import Parity, verify_outputs
from moefoundry.conversion.safetensors_io import write_file, write_safetensors
from moefoundry.conversion.starting_recipe import starting_recipe, with_balance
from moefoundry.conversion.tensor_map import Dtype, TensorMap, check_tensors
from moefoundry.data.json_files import write_json
from moefoundry.data.staging import GIB, staged
from moefoundry.data.tokenizer_files import (
    CONFIG,
    check_importable,
    export_tokenizer,
    has_tokenizer,
    import_tokenizer,
)
from moefoundry.model.transformer import MoETransformer, meta_model

RECIPE = "recipe.yaml"
DEFAULT_MAX_SEQ_LEN = 4096  # where neither config nor recipe says; it bounds nothing that is computed
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Summary:
    """Result of a conversion.

    Attributes:
        path: File or directory written.
        num_tensors, nbytes: Number and size of the tensors written.
        has_tokenizer: True if a tokenizer came with it; None where none is expected.
        parity: Differences from transformers' outputs; None where they were not compared.
    """

    path: Path
    num_tensors: int
    nbytes: int
    has_tokenizer: bool | None = None
    parity: Parity | None = None

    def __str__(self) -> str:
        text = f"{self.path}: {self.num_tensors} tensors, {self.nbytes / GIB:.2f} GiB"
        if self.has_tokenizer is False:
            text += "; no tokenizer"
        if self.parity is not None:
            text += f"; {self.parity}"
        return text


def import_hf(hf: Path, output: Path, dtype: Dtype = Dtype.keep, tolerance: float | None = None) -> Summary:
    """Write a weights-only checkpoint of a Hugging Face directory, with its tokenizer and a recipe that trains it.

    Args:
        hf: Directory with config.json and safetensors.
        output: Checkpoint directory to make.
        dtype: Type of the stored parameters; a run that starts from them makes them fp32.
        tolerance: Largest difference of logits that is accepted; None compares none.

    Raises:
        UserError: As :func:`open_hf`; or ``output`` exists, or logits differ.
    """
    source = open_hf(hf, dtype.torch)
    specs = source.names.our_specs(source.tensors.specs, dtype)
    blocks = source.names.our_blocks(source.tensors, specs)
    tokenizer = check_importable(hf)
    say(*source.notes)
    with staged(output, nbytes_of(specs)) as staging:
        staging.mkdir()
        write_weights(staging, source.cfg, specs, blocks, source.max_seq_len)
        balanced = with_balance(source.family, source.cfg, source.config)
        write_recipe(staging, balanced, source, output)
        import_tokenizer(hf, staging / TOKENIZER)
        parity = None
        if tolerance is not None:
            parity = verify_outputs(hf, load_model(staging), tolerance, dtype.torch, dtype.torch or torch.bfloat16)
    return Summary(output, len(specs), nbytes_of(specs), tokenizer, parity)


def export_hf(
    checkpoint: Path,
    hf: Path,
    family_name: str | None = None,
    dtype: Dtype = Dtype.keep,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    tolerance: float | None = None,
    weights: Weights = Weights.trained,
) -> Summary:
    """Write a Hugging Face directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Args:
        checkpoint: A checkpoint of any mesh, weights-only or not, or the run that holds it.
        hf: Directory to make.
        family_name: ``model_type`` to export as; None is the first that fits.
        dtype: Type of the stored parameters.
        max_shard_bytes: Largest size of a shard.
        tokenizer: Directory of the tokenizer; None is the checkpoint's own, or that of its run.
        tolerance: As in :func:`import_hf`.
        weights: Values to take for the parameters.

    Raises:
        UserError: The family cannot hold the model (with the reasons), a tensor, the average or the tokenizer is
            missing, ``hf`` exists, or logits differ.
    """
    directory = named_checkpoint(checkpoint)
    recipe, cfg = read_state(directory)["recipe"], read_model_config(directory)
    family = _family(family_name, cfg)
    names = TensorMap(family, cfg)
    ours = open_checkpoint(directory, meta_model(cfg), weights)
    specs = names.their_specs(ours.specs, dtype)
    config = family.write_config(cfg, recipe.get("max_seq_len", DEFAULT_MAX_SEQ_LEN), _main_dtype(specs))
    tokenizer = tokenizer or tokenizer_of(directory, recipe)
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise UserError(f"no tokenizer at {tokenizer}; name its directory: tokenizer=...")
    with using(directory), staged(hf, nbytes_of(specs)) as staging:
        staging.mkdir()
        write_safetensors(staging, specs, lambda name: names.their_blocks(name, ours, specs[name]), max_shard_bytes)
        special = export_tokenizer(tokenizer or directory / TOKENIZER, staging)
        write_json(staging / CONFIG, config | special)
        parity = None
        if tolerance is not None:
            parity = verify_outputs(staging, load_model(directory, weights), tolerance, dtype.torch)
    return Summary(hf, len(specs), nbytes_of(specs), tokenizer is not None, parity)


def consolidate(
    checkpoint: Path, output: Path, max_shard_bytes: int = SHARD_BYTES, weights: Weights = Weights.trained
) -> Summary:
    """Write the parameters and buffers of a checkpoint as safetensors, under the names of ``MoETransformer``.

    Args:
        checkpoint: As in :func:`export_hf`.
        output: A file ``*.safetensors``, or a directory, which may be given shards.
        max_shard_bytes: Largest size of a shard.
        weights: Values to take for the parameters.

    Raises:
        UserError: A tensor or the average is missing, ``output`` exists, or it is one file and all would not fit.
    """
    directory = named_checkpoint(checkpoint)
    ours = open_checkpoint(directory, meta_model(read_model_config(directory)), weights)
    size = nbytes_of(ours.specs)
    one_file = output.suffix == ".safetensors"
    if one_file and size > max_shard_bytes:
        raise UserError(f"{output}: {size / GIB:.2f} GiB exceed one shard; name a directory, or allow a larger shard")
    with using(directory), staged(output, size) as staging:
        if one_file:
            write_file(staging, ours.specs, ours.rows)
        else:
            staging.mkdir()
            write_safetensors(staging, ours.specs, ours.rows, max_shard_bytes)
    return Summary(output, len(ours.specs), size)


def load_hf(hf: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> MoETransformer:
    """Load the model of a Hugging Face directory, in evaluation mode.

    Args:
        hf: Directory with config.json and safetensors.
        dtype: dtype of the parameters. Buffers keep theirs.
        device: Device of the model.

    Raises:
        UserError: The config means a model not known here; or a tensor is missing, too many or misshapen (all are
            named); or the weights are pickled, or quantized other than in FP8 blocks.
    """
    source = open_hf(hf, dtype)
    for note in source.notes:
        warnings.warn(note, stacklevel=3)
    model = meta_model(source.cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    tensors = model.state_dict()
    specs = source.names.our_specs(source.tensors.specs, Dtype.keep)
    for block in source.names.our_blocks(source.tensors, specs):
        block.box_of(tensors[block.name]).copy_(block.values)
    return model.eval()


def open_checkpoint(directory: Path, model: MoETransformer, weights: Weights) -> StoredTensors:
    """Open the parameters and buffers of a checkpoint, checked against the shapes of its model."""
    names = stored_names(directory, model, weights)
    ours = StoredTensors(directory, PREFIX, names)
    check_tensors(ours.specs, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, directory)
    return ours


def write_weights(
    staging: Path,
    cfg: ModelConfig,
    specs: Mapping[str, TensorSpec],
    shards: Iterable[ShardValues],
    max_seq_len: int | None,
) -> None:
    """Write a weights-only checkpoint; names are those of ``MoETransformer``."""
    kept = ("model.", VERSION_KEY)
    recipe = {key: value for key, value in flatten(Recipe(model=cfg)).items() if key.startswith(kept)}
    if max_seq_len is not None:
        recipe["max_seq_len"] = max_seq_len
    stored = {PREFIX + name: spec for name, spec in specs.items()}
    renamed = (replace(shard, name=PREFIX + shard.name) for shard in shards)
    write_shards(staging, stored, renamed, {WEIGHTS_ONLY: True, "recipe": recipe})


def write_recipe(staging: Path, cfg: ModelConfig, source: HfDirectory, output: Path) -> None:
    """Write the recipe that goes on training the weights of ``output``."""
    title = f"Goes on with {source.path.resolve().name} ({source.family.name})"
    weights = os.path.abspath(output)  # runs start in other directories, too
    (staging / RECIPE).write_text(starting_recipe(cfg, output.name, title, source.max_seq_len, weights))


def _family(name: str | None, cfg: ModelConfig) -> Family:
    if name is None:
        return family_for(cfg)
    if name not in FAMILIES:
        raise UserError(f"no model family {name!r}; there are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """Name the dtype that most bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        sizes[spec.dtype] += spec.nbytes
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def say(*notes: str) -> None:
    """Tell the user what they may not expect, before the conversion takes its time."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def nbytes_of(specs: Mapping[str, TensorSpec]) -> int:
    """Sum the sizes of tensors in bytes."""
    return sum(spec.nbytes for spec in specs.values())
