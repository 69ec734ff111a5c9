"""``moefoundry convert``: what ``scripts/convert_ckpt.py`` runs. Heavy imports happen when it runs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moefoundry.cli.arguments import (
    Group,
    Number,
    flags_of,
    input_argument,
    json_option,
    local_path,
    options_named,
    output_option,
)
from moefoundry.config import UserError

if TYPE_CHECKING:
    from moefoundry.checkpoint.weights import Weights
    from moefoundry.conversion.convert import Summary

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
TOLERANCE = 1e-3  # of logits in fp32; those of a different model differ by far more


@click.group("convert", cls=Group)
def command() -> None:
    """Convert checkpoints from and to Hugging Face directories; see docs/conversion.md."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is all there is


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)(B|KB|MB|GB)", text)
    if not match or not (size := int(float(match[1]) * UNITS[match[2]])):
        raise click.BadParameter(f"{text!r} is no size; write a number and one of {', '.join(UNITS)}")
    return size


def _layers(text: str) -> frozenset[int]:
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text):
        raise click.BadParameter(f"{text!r} are no layers; write numbers and ranges, such as 0,2,4-7")
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    if backwards := [ends for ends in ranges if ends[0] > ends[-1]]:
        raise click.BadParameter(f"{text!r}: {backwards[0][0]} is after {backwards[0][-1]}")
    return frozenset(index for ends in ranges for index in range(ends[0], ends[-1] + 1))


_hf_input = input_argument("HF_DIR", "Holds config.json and safetensors; a path or a URL.", former="--hf")
_checkpoint_input = input_argument(
    "CHECKPOINT", "A checkpoint of any mesh, or a run (its newest); a path or a URL.", former="--checkpoint"
)
_checkpoint_output = output_option("DIR", "Checkpoint directory to make.")
_ema = click.option("--ema", is_flag=True, help="Take the moving average in place of the trained parameters.")
_base = click.option("--base", metavar="CHECKPOINT", help="Base of adapters (default: where it was).")
_family = click.option("--family", metavar="F", help="model_type to export as (default: the first that fits).")
_dtype = click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "keep"]),
    default="keep",
    help="Type of the parameters written (default keep).",
)
_shard_size = click.option(
    "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="Such as 500MB (default 5GB)."
)


def _verification(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--verify`` and its ``--tolerance``."""
    text = f"Largest difference that --verify accepts (default {TOLERANCE:g})."
    tolerance = click.option("--tolerance", type=Number(), default=TOLERANCE, metavar="X", help=text)
    text = "Compare logits with transformers' (adapters: peft's), and checksums of what went in and came out."
    return click.option("--verify", is_flag=True, help=text)(tolerance(function))


@command.command("import", short_help="Hugging Face directory -> weights-only checkpoint.")
@_hf_input
@_checkpoint_output
@click.option("--recipe", type=local_path, metavar="FILE", help="LLM Foundry's recipe of a checkpoint of Composer.")
@_dtype
@click.option("--base", metavar="CHECKPOINT", help="Base of the adapters, where HF_DIR is a directory of peft's.")
@_verification
@json_option
def import_(
    source: str,
    output: Path,
    recipe: Path | None,
    dtype: str,
    base: str | None,
    verify: bool,
    tolerance: float,
    as_json: bool,
) -> None:
    """Write a weights-only checkpoint with the tensors of a Hugging Face directory, and a recipe that trains them.

    A directory of peft's becomes a checkpoint of adapters on top of --base. A checkpoint of Composer's trainer, a .pt
    file or a directory of shards, is taken in place of the directory: an MPT of LLM Foundry that can be expressed here,
    or this project's own model. Shards do not tell their model: --recipe does.
    """
    from moefoundry.checkpoint.fetch import checkpoint_at, directory_at
    from moefoundry.conversion.convert import import_hf
    from moefoundry.conversion.peft import CONFIG_FILE
    from moefoundry.conversion.peft_import import import_peft
    from moefoundry.conversion.tensor_map import Dtype
    from moefoundry.migration.composer_checkpoint import is_foreign
    from moefoundry.migration.import_foreign import import_foreign

    if is_foreign(Path(source)):
        if verify:
            raise click.UsageError("--verify compares with transformers, which has no such model")
        _tell(import_foreign(Path(source), output, Dtype(dtype), recipe), as_json)
        return
    if recipe is not None:
        raise click.UsageError("--recipe is for checkpoints of Composer")
    with directory_at(source) as hf:
        if not (hf / CONFIG_FILE).is_file():
            if base is not None:
                raise UserError(f"{hf}: --base is of adapters, and there is no {CONFIG_FILE}")
            _tell(import_hf(hf, output, Dtype(dtype), tolerance if verify else None), as_json)
            return
        if base is None:
            raise UserError(f"{hf} has adapters; name the checkpoint of their base: --base CHECKPOINT")
        with checkpoint_at(base) as under:
            _tell(import_peft(hf, under, output), as_json)


@command.command(short_help="Checkpoint -> Hugging Face directory.")
@_checkpoint_input
@output_option("HF_DIR", "Directory to make.", former="--hf")
@_ema
@_family
@click.option("--merge", is_flag=True, help="Of adapters: export the model that they make of their base.")
@click.option(
    "--experts",
    type=click.Choice(["fused", "separate"]),
    default="fused",
    help="Of adapters: fused for transformers 5 (default), separate for transformers 4.",
)
@_base
@click.option("--tokenizer", type=local_path, metavar="DIR", help="Tokenizer (default: the run's).")
@_dtype
@_shard_size
@_verification
@json_option
def export(
    source: str,
    output: Path,
    ema: bool,
    family: str | None,
    merge: bool,
    experts: str,
    base: str | None,
    tokenizer: Path | None,
    dtype: str,
    max_shard_size: int,
    verify: bool,
    tolerance: float,
    as_json: bool,
) -> None:
    """Write a Hugging Face directory that AutoModelForCausalLM loads; of adapters, what peft loads on top of one."""
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.weights import named_checkpoint, read_lora_config
    from moefoundry.conversion.convert import export_hf
    from moefoundry.conversion.peft import export_peft
    from moefoundry.conversion.peft_names import ExpertKind
    from moefoundry.conversion.tensor_map import Dtype

    with checkpoint_at(source) as checkpoint, options_named(flags_of("tokenizer", "family")):
        if not merge and read_lora_config(named_checkpoint(checkpoint)) is not None:
            _refuse_of_whole_models()
            kind, accepted = ExpertKind(experts), tolerance if verify else None
            _tell(export_peft(checkpoint, output, family, kind, _weights(ema), accepted, base), as_json)
            return
        summary = export_hf(
            checkpoint,
            output,
            family_name=family,
            dtype=Dtype(dtype),
            max_shard_bytes=max_shard_size,
            tokenizer=tokenizer,
            tolerance=tolerance if verify else None,
            weights=_weights(ema),
            base=base,
        )
    _tell(summary, as_json)


def _refuse_of_whole_models() -> None:
    """Refuse options that say nothing of adapters, which are written as they are stored."""
    context = click.get_current_context()
    given = [name for name in ("tokenizer", "dtype", "max_shard_size") if _is_given(context, name)]
    if given:
        flags = ", ".join(flags_of(*given).values())
        raise click.UsageError(f"{flags}: of a whole model, and adapters are exported; --merge exports their model")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE


@command.command(short_help="Adapters -> weights-only checkpoint, with their base.")
@_checkpoint_input
@_checkpoint_output
@_ema
@_base
@_dtype
@json_option
def merge(source: str, output: Path, ema: bool, base: str | None, dtype: str, as_json: bool) -> None:
    """Write a weights-only checkpoint of a base with adapters merged into it."""
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.conversion.convert import merge_adapters
    from moefoundry.conversion.tensor_map import Dtype

    with checkpoint_at(source) as checkpoint:
        _tell(merge_adapters(checkpoint, output, Dtype(dtype), _weights(ema), base), as_json)


@command.command(short_help="Checkpoint -> safetensors with our names.")
@_checkpoint_input
@output_option("PATH", "A file *.safetensors, or a directory.")
@_ema
@_base
@_shard_size
@json_option
def consolidate(source: str, output: Path, ema: bool, base: str | None, max_shard_size: int, as_json: bool) -> None:
    """Write the parameters and buffers of a checkpoint as safetensors, under this package's names."""
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.conversion.convert import consolidate

    with checkpoint_at(source) as checkpoint:
        _tell(consolidate(checkpoint, output, max_shard_size, _weights(ema), base), as_json)


@command.command(short_help="Dense Hugging Face directory -> mixture of experts.")
@_hf_input
@_checkpoint_output
@click.option("--num-experts", type=int, required=True, metavar="E", help="Experts of each layer.")
@click.option("--top-k", type=int, required=True, metavar="K", help="Experts of each token.")
@click.option("--granularity", type=int, default=1, metavar="G", help="Slices of the FFN (default 1).")
@click.option("--noise", type=Number(), default=0.0, metavar="STD", help="Noise added to experts (default 0).")
@click.option("--seed", type=int, default=17, metavar="N", help="Decides the router and the noise (default 17).")
@click.option("--layers", type=_layers, metavar="0,2,4-7", help="Blocks that get experts (default all).")
@_dtype
@json_option
def upcycle(source: str, output: Path, dtype: str, as_json: bool, **options: Any) -> None:
    """Write a checkpoint of a mixture of experts, made of the weights of a dense model."""
    from moefoundry.checkpoint.fetch import directory_at
    from moefoundry.conversion.tensor_map import Dtype
    from moefoundry.conversion.upcycle import Upcycling, upcycle

    with directory_at(source) as hf, options_named(flags_of(*options)):
        _tell(upcycle(hf, output, Upcycling(**options), Dtype(dtype)), as_json)


def _weights(ema: bool) -> Weights:
    from moefoundry.checkpoint.weights import Weights

    return Weights.ema if ema else Weights.trained


def _tell(summary: Summary, as_json: bool) -> None:
    if not as_json:
        print(summary)
        return
    difference = None if summary.parity is None else summary.parity.logits
    print(json.dumps({**asdict(summary), "max_difference": difference}, indent=2, default=str))
