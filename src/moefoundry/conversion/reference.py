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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.hf_directory import read_hf_config
from moefoundry.conversion.their_model import (
    Outputs,
    block_outputs,
    family_there,
    is_older,
    no_warnings,
    outputs_of_the_whole,
)

NEWER = "MOEFOUNDRY_TRANSFORMERS5"
CHECKOUT = Path(__file__).parents[3]
NONE = "none"  # a dtype that is not given, on the command line of the other process


@dataclass(frozen=True)
class Reading:
    """Ways to read a directory.

    Attributes:
        stored_as: dtype to which parameters are rounded; None rounds nothing.
        quantized_as: dtype in which FP8 and INT4 weights are read. Transformers computes with them on GPUs only.
        by_block: Have one block in memory at a time.
        adapters: Directory of adapters that peft loads on top of the whole model; None is the model alone.
        major: Version of transformers that the adapters are for, 4 or 5; None is either.
    """

    stored_as: torch.dtype | None = None
    quantized_as: torch.dtype = torch.bfloat16
    by_block: bool = False
    adapters: Path | None = None
    major: int | None = None

    @classmethod
    def of(cls, words: list[str]) -> Reading:
        """Read :attr:`words`."""
        stored_as, quantized_as, by_block, adapters = words
        return cls(
            None if stored_as == NONE else getattr(torch, stored_as),
            getattr(torch, quantized_as),
            bool(by_block),
            Path(adapters) if adapters else None,
        )

    @property
    def words(self) -> list[str]:
        """The same on a command line; the version has been chosen."""
        dtypes = [
            NONE if dtype is None else str(dtype).removeprefix("torch.")
            for dtype in (self.stored_as, self.quantized_as)
        ]
        return [*dtypes, "by_block" if self.by_block else "", str(self.adapters or "")]


def newer_transformers() -> Path | None:
    """Find the directory of a newer transformers; None where there is none."""
    place = Path(os.environ[NEWER]) if os.environ.get(NEWER) else CHECKOUT / ".oracle"
    return place if (place / "transformers").is_dir() else None


def reference_outputs(hf: Path, cfg: ModelConfig, reading: Reading) -> Outputs:
    """Run transformers' model of a directory.

    Args:
        hf: The directory.
        cfg: The model that its config declares, with the prediction modules that its files hold.
        reading: Ways to read it.

    Raises:
        UserError: No version here knows or loads such a model.
    """
    import transformers

    kind = family_there(read_hf_config(hf)).name
    known = kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if known and reading.major in (None, 4 if is_older() else 5):
        return _run_here(hf, cfg, reading)
    here = f"{hf} cannot be verified: transformers {transformers.__version__}"
    if reading.major == 4:
        lack = "has no separate experts, which these adapters are for" if known else f"has no {kind}"
        raise UserError(f"{here} {lack}; verify the merged model: --merge --verify")
    place = newer_transformers()
    if place is None:
        lack = "has no fused experts, which these adapters are for" if known else f"has no {kind}"
        raise UserError(f"{here} {lack}; `make oracle` installs one that has, or {NEWER} names the directory of one")
    return _run_there(place, hf, reading)


def _run_there(place: Path, hf: Path, reading: Reading) -> Outputs:
    """Run ``python -m moefoundry.conversion.reference`` with the transformers in ``place``."""
    path = os.pathsep.join([str(place), str(CHECKOUT / "src"), *sys.path])
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "outputs.safetensors"
        command = [sys.executable, "-m", "moefoundry.conversion.reference", str(hf), str(out), *reading.words]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
            raise UserError(reason.removeprefix("error: "))
        tensors = load_file(out)
        version = done.stdout.split()[-1]
    hidden = [tensors[f"hidden.{index}"] for index in range(len(tensors) - 1)]
    return Outputs(version, tensors["logits"], hidden)


@torch.no_grad()
def _run_here(hf: Path, cfg: ModelConfig, reading: Reading) -> Outputs:
    import transformers

    try:
        with no_warnings():
            if reading.by_block:
                return block_outputs(hf, cfg, reading.stored_as, reading.quantized_as)
            return outputs_of_the_whole(hf, cfg, reading.stored_as, reading.quantized_as, reading.adapters)
    except Exception as error:  # whatever its classes may raise
        text = " ".join(str(error).split())
        version = transformers.__version__
        raise UserError(f"{hf} cannot be verified: transformers {version} does not load it: {text}") from error


def _main(hf: str, out: str, *words: str) -> None:
    from moefoundry.conversion.hf_directory import open_hf

    try:
        found = _run_here(Path(hf), open_hf(Path(hf)).cfg, Reading.of(list(words)))
    except UserError as error:
        sys.exit(f"error: {error}")
    blocks = {f"hidden.{index}": values.contiguous() for index, values in enumerate(found.hidden)}
    save_file({"logits": found.logits.contiguous()} | blocks, out)
    print(found.version)


if __name__ == "__main__":
    _main(*sys.argv[1:])
