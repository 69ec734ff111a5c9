"""Lossless conversion between checkpoints here and Hugging Face directories.

    import       HF directory  -> weights-only checkpoint, which a run's ``load_path`` may name
    export       checkpoint    -> HF directory, which ``AutoModelForCausalLM`` loads
    consolidate  checkpoint    -> safetensors with our names
    merge        adapters      -> weights-only checkpoint, with their base

Everything is checked before anything is written, what is written gets its final name when it is complete, and nothing
is overwritten. Memory is needed for a block (see ``tensor_map.py``), whatever the model's size.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.manifest import WEIGHTS_ONLY, read_state
from moefoundry.checkpoint.out_of_core import ShardValues, write_shards
from moefoundry.checkpoint.store import TOKENIZER
from moefoundry.checkpoint.weights import (
    PREFIX,
    Weights,
    load_model,
    named_checkpoint,
    read_lora_config,
    read_model_config,
    tokenizer_of,
)
from moefoundry.config import ModelConfig, Recipe, UserError, flatten
from moefoundry.config.versions import VERSION_KEY
from moefoundry.conversion.adapted import Tensors, weights_of
from moefoundry.conversion.checksums import Checksums, checksums_of_export, checksums_of_import
from moefoundry.conversion.equivalent_tensors import EquivalentTensors
from moefoundry.conversion.families import FAMILIES, Family, holder_of
from moefoundry.conversion.families.equivalents import Equivalent
from moefoundry.conversion.hf_directory import HfDirectory, open_hf
from moefoundry.conversion.parity import Parity, fits_twice, verify_by_block, verify_outputs
from moefoundry.conversion.reference import Reading
from moefoundry.conversion.safetensors_io import write_file, write_safetensors
from moefoundry.conversion.starting_recipe import starting_recipe, with_balance
from moefoundry.conversion.tensor_map import Dtype, TensorMap
from moefoundry.data.json_files import write_json
from moefoundry.data.staging import GIB, staged
from moefoundry.data.tokenizer_files import (
    CONFIG,
    check_importable,
    copy_tokenizer,
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
        checksums: Checksums of what went in and came out; None where they were not compared.
    """

    path: Path
    num_tensors: int
    nbytes: int
    has_tokenizer: bool | None = None
    parity: Parity | None = None
    checksums: Checksums | None = None

    def __str__(self) -> str:
        text = f"{self.path}: {self.num_tensors} tensors, {self.nbytes / GIB:.2f} GiB"
        if self.has_tokenizer is False:
            text += "; no tokenizer"
        if self.parity is not None:
            text += f"; {self.parity}"
        if self.checksums is not None:
            text += f"; {self.checksums}"
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
        parity, checksums = None, None
        if tolerance is not None:
            checksums = checksums_of_import(source, specs, staging)
            parity = _import_parity(hf, staging, source.cfg, tolerance, dtype)
    return Summary(output, len(specs), nbytes_of(specs), tokenizer, parity, checksums)


def _import_parity(hf: Path, checkpoint: Path, cfg: ModelConfig, tolerance: float, dtype: Dtype) -> Parity:
    reading = Reading(dtype.torch, dtype.torch or torch.bfloat16)
    with weights_of(checkpoint) as written:
        if not fits_twice(written):
            return verify_by_block(hf, cfg, written, tolerance, reading)
    return verify_outputs(hf, load_model(checkpoint), tolerance, reading)


def export_hf(
    checkpoint: Path,
    hf: Path,
    family_name: str | None = None,
    dtype: Dtype = Dtype.keep,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    tolerance: float | None = None,
    weights: Weights = Weights.trained,
    base: str | None = None,
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
        base: Where the base of a checkpoint of adapters is now; they are merged into it. None is where it was.

    Raises:
        UserError: The family cannot hold the model (with the reasons), a tensor, the average or the tokenizer is
            missing, ``hf`` exists, or logits differ.
    """
    directory = named_checkpoint(checkpoint)
    recipe, cfg = read_state(directory)["recipe"], read_model_config(directory)
    family, same = exported_as(family_name, cfg)
    names = TensorMap(family, same.cfg)
    tokenizer = tokenizer or tokenizer_of(directory, recipe)
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise UserError(f"no tokenizer at {tokenizer}; name its directory: tokenizer=...")
    say_changes(family, same)
    with weights_of(directory, weights, base) as stored:
        ours = EquivalentTensors(stored, same)
        specs = names.their_specs(ours.specs, dtype)
        config = family.write_config(same.cfg, recipe.get("max_seq_len", DEFAULT_MAX_SEQ_LEN), _main_dtype(specs))
        with staged(hf, nbytes_of(specs)) as staging:
            staging.mkdir()
            write_safetensors(staging, specs, lambda name: names.their_blocks(name, ours, specs[name]), max_shard_bytes)
            special = export_tokenizer(tokenizer or directory / TOKENIZER, staging)
            write_json(staging / CONFIG, config | special)
            parity, checksums = None, None
            if tolerance is not None:
                checksums = checksums_of_export(ours, family, same.cfg, specs, staging)
                if fits_twice(stored):
                    model = load_model(directory, weights, base_place=base)
                    parity = verify_outputs(staging, model, tolerance, Reading(dtype.torch))
                else:
                    parity = verify_by_block(staging, cfg, stored, tolerance, Reading(dtype.torch))
    return Summary(hf, len(specs), nbytes_of(specs), tokenizer is not None, parity, checksums)


def merge_adapters(
    checkpoint: Path,
    output: Path,
    dtype: Dtype = Dtype.keep,
    weights: Weights = Weights.trained,
    base: str | None = None,
) -> Summary:
    """Write a weights-only checkpoint of whole weights: adapters merged into their base.

    Args:
        checkpoint: A checkpoint of adapters, or the run that holds it.
        output: Checkpoint directory to make.
        dtype: Type of the stored parameters; ``keep`` is the base's.
        weights: Values to take for the adapters.
        base: As in :func:`export_hf`.

    Raises:
        UserError: The checkpoint has no adapters, a tensor or the base is missing, or ``output`` exists.
    """
    directory = named_checkpoint(checkpoint)
    if read_lora_config(directory) is None:
        raise UserError(f"{directory} has whole weights: there is nothing to merge")
    recipe, cfg = read_state(directory)["recipe"], read_model_config(directory)
    with weights_of(directory, weights, base) as ours:
        buffers = {name for name, _ in meta_model(cfg).named_buffers()}
        specs = {
            name: spec if name in buffers else TensorSpec(spec.shape, dtype.torch or spec.dtype)
            for name, spec in ours.specs.items()
        }
        with staged(output, nbytes_of(specs)) as staging:
            staging.mkdir()
            write_weights(staging, cfg, specs, _shards(ours, specs), recipe.get("max_seq_len"))
            tokenizer = tokenizer_of(directory, recipe)
            if tokenizer is not None and tokenizer.is_dir():
                copy_tokenizer(tokenizer, staging / TOKENIZER)
    return Summary(output, len(specs), nbytes_of(specs), tokenizer is not None)


def _shards(ours: Tensors, specs: Mapping[str, TensorSpec]) -> Iterator[ShardValues]:
    """Yield the values of tensors in the dtypes of ``specs``, a range of rows at a time."""
    for name, spec in specs.items():
        first = 0
        for values in ours.rows(name):
            yield ShardValues(name, (first, *(0 for _ in values.shape[1:]))[: values.dim()], values.to(spec.dtype))
            first += len(values) if values.dim() else 0


def consolidate(
    checkpoint: Path,
    output: Path,
    max_shard_bytes: int = SHARD_BYTES,
    weights: Weights = Weights.trained,
    base: str | None = None,
) -> Summary:
    """Write the parameters and buffers of a checkpoint as safetensors, under the names of ``MoETransformer``.

    Args:
        checkpoint: As in :func:`export_hf`.
        output: A file ``*.safetensors``, or a directory, which may be given shards.
        max_shard_bytes: Largest size of a shard.
        weights: Values to take for the parameters.
        base: As in :func:`export_hf`.

    Raises:
        UserError: A tensor or the average is missing, ``output`` exists, or it is one file and all would not fit.
    """
    one_file = output.suffix == ".safetensors"
    with weights_of(named_checkpoint(checkpoint), weights, base) as ours:
        size = nbytes_of(ours.specs)
        if one_file and size > max_shard_bytes:
            problem = f"{size / GIB:.2f} GiB exceed one shard; name a directory, or allow a larger shard"
            raise UserError(f"{output}: {problem}")
        with staged(output, size) as staging:
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


def exported_as(name: str | None, cfg: ModelConfig) -> tuple[Family, Equivalent]:
    """Find the family of this name, or the first that computes what a model does, and the model that it has.

    Raises:
        UserError: There is none; or the family does not compute it, with the reasons.
    """
    if name is not None and name not in FAMILIES:
        raise UserError(f"no model family {name!r}; there are {', '.join(sorted(FAMILIES))}")
    family, same = holder_of(cfg, name)
    family.check(same.cfg)
    return family, same


def say_changes(family: Family, same: Equivalent) -> None:
    """Tell the user in what terms a family has a model."""
    if same.changes:
        say(f"as {family.name}, which computes the same with {' and '.join(same.changes)}")


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
