"""Transformers' own outputs for a Hugging Face directory, by whichever version of it can build the model.

The environment's transformers comes first. Where it does not know the ``model_type``, a newer one that lies in a
directory beside it is asked, in a process of its own: ``.oracle`` of the checkout, which ``make oracle`` makes, or the
directory that ``MOEFOUNDRY_TRANSFORMERS5`` names. Both share the environment's torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moefoundry.config import MlaConfig, ModelConfig, UserError
from moefoundry.conversion.families import family_of
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.hf_directory import read_hf_config
from moefoundry.conversion.safetensors_io import SafetensorsReader

BATCH = (2, 64)
NEWER = "MOEFOUNDRY_TRANSFORMERS5"
CHECKOUT = Path(__file__).parents[3]
OPTIONS = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
NONE = "none"  # a dtype that is not given, on the command line of the other process


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model in fp32 on :func:`batch_of`.

    Attributes:
        version: Version of the transformers that computed them.
        logits: [B, S, V].
        hidden: Output of each block, [B, S, D].
    """

    version: str
    logits: Tensor
    hidden: list[Tensor]


def batch_of(vocab_size: int) -> Tensor:
    """Draw the fixed batch of tokens, int64 [B, S]."""
    return torch.randint(vocab_size, BATCH, generator=torch.Generator().manual_seed(0))


def newer_transformers() -> Path | None:
    """Find the directory of a newer transformers; None where there is none."""
    place = Path(os.environ[NEWER]) if os.environ.get(NEWER) else CHECKOUT / ".oracle"
    return place if (place / "transformers").is_dir() else None


def reference_outputs(hf: Path, cfg: ModelConfig, stored_as: torch.dtype | None, fp8_as: torch.dtype) -> Outputs:
    """Run transformers' model of a directory.

    Args:
        hf: The directory.
        cfg: The model that its config declares, with the prediction modules that its files hold.
        stored_as: dtype to which parameters are rounded; None rounds nothing.
        fp8_as: dtype in which FP8 weights are read. Transformers computes with them on GPUs only.

    Raises:
        UserError: No version here knows or loads such a model.
    """
    import transformers

    kind = family_of(read_hf_config(hf)).name
    if kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        return _run_here(hf, cfg, stored_as, fp8_as)
    place = newer_transformers()
    if place is None:
        raise UserError(
            f"{hf} cannot be verified: transformers {transformers.__version__} has no {kind}; `make oracle` installs "
            f"one that has, or {NEWER} names the directory of one"
        )
    return _run_there(place, hf, stored_as, fp8_as)


def _run_there(place: Path, hf: Path, stored_as: torch.dtype | None, fp8_as: torch.dtype) -> Outputs:
    """Run ``python -m moefoundry.conversion.reference`` with the transformers in ``place``."""
    path = os.pathsep.join([str(place), str(CHECKOUT / "src"), *sys.path])
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "outputs.safetensors"
        dtypes = [NONE if dtype is None else str(dtype).removeprefix("torch.") for dtype in (stored_as, fp8_as)]
        command = [sys.executable, "-m", "moefoundry.conversion.reference", str(hf), str(out), *dtypes]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
            raise UserError(reason.removeprefix("error: "))
        tensors = load_file(out)
        version = done.stdout.split()[-1]
    hidden = [tensors[f"hidden.{index}"] for index in range(len(tensors) - 1)]
    return Outputs(version, tensors["logits"], hidden)


@torch.no_grad()
def _run_here(hf: Path, cfg: ModelConfig, stored_as: torch.dtype | None, fp8_as: torch.dtype) -> Outputs:
    import transformers

    try:
        with _no_warnings():
            model = _load(hf, cfg, fp8_as).eval()
    except Exception as error:  # whatever its classes may raise
        text = " ".join(str(error).split())
        version = transformers.__version__
        raise UserError(f"{hf} cannot be verified: transformers {version} does not load it: {text}") from error
    if stored_as is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored_as))
    base = model.base_model
    with outputs_of(base.layers if hasattr(base, "layers") else base.blocks) as hidden:
        logits = model(batch_of(cfg.vocab_size)).logits
    return Outputs(transformers.__version__, logits, hidden)


@contextmanager
def outputs_of(blocks: Any) -> Iterator[list[Tensor]]:
    """Collect the hidden states that blocks give while this is open."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence transformers, which warns of tensors that it does not use, as of multi-token prediction."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(hf: Path, cfg: ModelConfig, fp8_as: torch.dtype) -> Any:
    """Load the weights of a directory into transformers' model; by transformers itself, where it can."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = read_hf_config(hf)
    family = family_of(raw)
    older = int(transformers.__version__.partition(".")[0]) < 5
    newer_file = older and "rope_parameters" in raw  # a key that it would pass over, and compute another model
    ours = newer_file or raw["model_type"] != family.name  # another name of the architecture, which it does not know
    if not (ours or "quantization_config" in raw or (older and _without_query_rank(cfg))):
        return AutoModelForCausalLM.from_pretrained(hf, **OPTIONS)
    config = (
        AutoConfig.for_model(**family.write_config(cfg, family.max_seq_len(raw) or 1))
        if ours
        else AutoConfig.from_pretrained(hf)
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if not older:
        tensors = SafetensorsReader(hf, fp8_as=fp8_as)
        found = {name: tensors.read(name) for name in tensors.specs}
        its_class = AutoModelForCausalLM._model_mapping[type(config)]  # which, unlike Auto, needs no directory
        return its_class.from_pretrained(None, config=config, state_dict=found, **OPTIONS)
    model = _build(config)
    split = SplitExperts(SafetensorsReader(hf, fp8_as=fp8_as), family, cfg)
    query = "q_proj" if _without_query_rank(cfg) else "q_b_proj"
    stored = {name: name.replace("q_b_proj", query) for name in model.state_dict()}
    values = {name: split.read(there) for name, there in stored.items() if there in split.specs}
    model.load_state_dict(values, strict=False)  # that none is missing has been checked; a tied head is not stored
    model.tie_weights()
    return model


def _without_query_rank(cfg: ModelConfig) -> bool:
    return isinstance(cfg.attention, MlaConfig) and cfg.attention.q_lora_rank is None


def _build(config: Any) -> Any:
    """Build a model without its weights.

    Transformers 4.51 builds no DeepSeek-V3 whose queries are not compressed; its attention with nothing before
    ``q_b_proj`` is that.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **OPTIONS)
    except TypeError:
        if getattr(config, "q_lora_rank", 0) is not None:
            raise
    config.q_lora_rank = 1
    model = AutoModelForCausalLM.from_config(config, **OPTIONS)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_a_proj, attention.q_a_layernorm = nn.Identity(), nn.Identity()
        attention.q_b_proj = nn.Linear(config.hidden_size, attention.q_b_proj.out_features, bias=False)
    return model


def _main(hf: str, out: str, stored_as: str, fp8_as: str) -> None:
    from moefoundry.conversion.hf_directory import open_hf

    rounded = None if stored_as == NONE else getattr(torch, stored_as)
    try:
        found = _run_here(Path(hf), open_hf(Path(hf)).cfg, rounded, getattr(torch, fp8_as))
    except UserError as error:
        sys.exit(f"error: {error}")
    blocks = {f"hidden.{index}": values.contiguous() for index, values in enumerate(found.hidden)}
    save_file({"logits": found.logits.contiguous()} | blocks, out)
    print(found.version)


if __name__ == "__main__":
    _main(*sys.argv[1:])
