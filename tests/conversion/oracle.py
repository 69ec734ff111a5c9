"""The transformers of today as an oracle: one process for all families, and its results kept while nothing changes.

``make oracle`` installs it into ``.oracle``; ``MOEFOUNDRY_TRANSFORMERS5`` names another place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from moefoundry.conversion.convert import export_hf, import_hf
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.reference import newer_transformers
from tests.conversion.families.models import CASES, STANDS_IN, VARIANTS, sizes
from tests.conversion.hf import family_config, write_hf, write_mxfp4, write_tokenizer

needs_oracle = pytest.mark.skipif(newer_transformers() is None, reason="`make oracle` has not been run")
WITHOUT_VISION = (
    "import runpy, sys; sys.modules['torchvision'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script where torchvision, which takes seconds to import, is not there."""
TEXTS, MXFP4, TOKENIZER = "text-", "mxfp4", "tokenizer"
WRITERS = ("mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe", "minimax_m2", "olmo2")
"""Families that write text; the tokens of all are compared."""
GPT_OSS = VARIANTS["gpt_oss"]["plain"]
PACKABLE = replace(GPT_OSS, moe=replace(GPT_OSS.moe, expert_hidden_size=32))
SCRIPT = Path(__file__).with_name("transformers5.py")


@dataclass(frozen=True)
class Peer:
    """Directories, and what transformers 5 computes with each."""

    path: Path
    results: dict[str, Any]


def run_peer(action: str, directory: Path, cache: Path) -> Peer:
    """Run it over ``directory``, or take what an earlier run over equal files has left in ``cache``."""
    place = newer_transformers()
    assert place is not None
    kept = cache / f"{action}-{_digest(directory, place)}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for old in cache.glob(f"{action}-*"):
                shutil.rmtree(old)
            work = cache / f"new-{action}"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(directory, work)
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
            command = [sys.executable, "-c", WITHOUT_VISION, str(SCRIPT), action, str(work)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            work.rename(kept)
    return Peer(kept, torch.load(kept / "results.pt"))


def _digest(directory: Path, place: Path) -> str:
    """Sum up the files, the script and the version."""
    versions = sorted(path.name for path in place.glob("*.dist-info"))
    total = hashlib.sha256(SCRIPT.read_bytes() + "".join(versions).encode())
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(directory)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def write_cases(directory: Path) -> None:
    """Ask for every variant of every family, and for the defaults of each; for experts in MXFP4, and for text."""
    configs = {
        f"{family}-{variant}": FAMILIES[family].write_config(VARIANTS[family][variant], 64, torch_dtype="float32")
        | {"model_type": STANDS_IN.get(family, family)}
        for family, variant in CASES
    }
    defaults = {family: sizes(family, configs[f"{family}-plain"]) for family in VARIANTS if family not in STANDS_IN}
    (directory / "cases.json").write_text(json.dumps({"configs": configs, "defaults": defaults}))
    write_mxfp4(directory / MXFP4, PACKABLE)
    with TemporaryDirectory() as place:
        work = Path(place)
        tokenizer = write_tokenizer(work / TOKENIZER)
        for family in WRITERS:
            write_hf(work / family, family, replace(family_config(family), vocab_size=270))
            import_hf(work / family, work / f"{family}-checkpoint")
            export_hf(work / f"{family}-checkpoint", directory / f"{TEXTS}{family}", family, tokenizer=tokenizer)
