"""Log-probabilities of a frozen reference model, beside the preference data that it has scored.

SPLIT/reference.npy is float32 [pairs, 2], the chosen and the rejected response of each pair, in the order of the data.
SPLIT/reference.json says what they are of: the digests of the file, of the data, and of the reference's tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefoundry.config.errors import UserError
from moefoundry.data.identity import stream_digest

VALUES, RECORD = "reference.npy", "reference.json"
HOW = "moefoundry reference CHECKPOINT DATA computes them"


def write_reference(directory: Path, log_probs_P2: NDArray[np.float32], checkpoint: str) -> None:
    """Store log-probabilities beside a split; the record is the last file that is replaced.

    Args:
        directory: Directory of the split.
        log_probs_P2: float32 [pairs, 2].
        checkpoint: Digest of the reference's tensors.
    """
    record, values = directory / RECORD, directory / VALUES
    record.unlink(missing_ok=True)
    partial = directory / f".{VALUES}"
    with partial.open("wb") as stream:
        np.save(stream, log_probs_P2)
    facts = {"checkpoint": checkpoint, "data": stream_digest(directory), "sha256": _sha256(partial)}
    partial.rename(values)
    partial = directory / f".{RECORD}"
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(partial, record)


def reference_beside(directory: Path) -> str | None:
    """Read the digest of the tensors whose log-probabilities lie beside a split; None if there are none of its data."""
    try:
        facts: dict[str, str] = json.loads((directory / RECORD).read_text())
        whole = facts["sha256"] == _sha256(directory / VALUES) and facts["data"] == stream_digest(directory)
        return facts["checkpoint"] if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_reference(directory: Path, pairs: int) -> tuple[NDArray[np.float32], str]:
    """Read the log-probabilities of a split, and the digest of the reference's tensors.

    Raises:
        UserError: They are absent, damaged, or of other data.
    """
    try:
        facts: dict[str, Any] = json.loads((directory / RECORD).read_text())
        values: NDArray[np.float32] = np.load(directory / VALUES, allow_pickle=False)
        checkpoint, data, sha256 = (str(facts[name]) for name in ("checkpoint", "data", "sha256"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; dpo needs those of a reference: {HOW}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{directory / RECORD}: cannot be read: {error}; {HOW}") from error
    if sha256 != _sha256(directory / VALUES) or values.shape != (pairs, 2) or values.dtype != np.float32:
        raise UserError(f"{directory / VALUES}: damaged; {HOW}")
    if data != stream_digest(directory):
        raise UserError(f"{directory / VALUES}: of other data than those beside it; {HOW}")
    return values, checkpoint


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
