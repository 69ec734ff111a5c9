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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.reference import newer_transformers
from tests.conversion.families.models import CASES, STANDS_IN, VARIANTS, sizes

needs_oracle = pytest.mark.skipif(newer_transformers() is None, reason="`make oracle` has not been run")
WITHOUT_VISION = (
    "import runpy, sys; sys.modules['torchvision'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script where torchvision, which takes seconds to import, is not there."""
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
    """Ask for every variant of every family, and for the defaults of each."""
    configs = {
        f"{family}-{variant}": FAMILIES[family].write_config(VARIANTS[family][variant], 64, torch_dtype="float32")
        | {"model_type": STANDS_IN.get(family, family)}
        for family, variant in CASES
    }
    defaults = {family: sizes(family, configs[f"{family}-plain"]) for family in VARIANTS if family not in STANDS_IN}
    (directory / "cases.json").write_text(json.dumps({"configs": configs, "defaults": defaults}))
