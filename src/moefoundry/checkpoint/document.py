"""``state.json``, all of a checkpoint that is not a tensor; read without importing what reads tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.manifest import Manifest
from moefoundry.checkpoint.store import STATE_FILE
from moefoundry.config import UserError
from moefoundry.config.versions import upgraded

STATE_KEYS = ("timestamp", "data", "world_size", "recipe")
WEIGHTS_ONLY = "weights_only"
"""Marks the state of a checkpoint without optimizer and position: besides it, only ``recipe`` is there, with
the keys of ``model``. A run that starts from it trains from its first batch on."""


def read_state(directory: Path) -> dict[str, Any]:
    """The JSON document of a checkpoint, its recipe as this release writes it.

    Raises:
        UserError: It is missing, damaged, or not what was saved; or lacks one of :data:`STATE_KEYS` (with
            :data:`WEIGHTS_ONLY`: the recipe).
    """
    path = directory / STATE_FILE
    try:
        content = path.read_bytes()
        state = json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable checkpoint state: {error}") from error
    if not isinstance(state, dict):
        state = {}
    missing = [key for key in (("recipe",) if state.get(WEIGHTS_ONLY) else STATE_KEYS) if key not in state]
    if missing:
        raise UserError(f"{path}: incomplete checkpoint state: it lacks {', '.join(missing)}")
    Manifest.read(directory).verify(STATE_FILE, 0, content)
    try:
        return state | {"recipe": upgraded(state["recipe"])} if isinstance(state["recipe"], dict) else state
    except ValueError as error:
        raise UserError(f"{path}: checkpoint of a later release: recipe of {error}") from error
