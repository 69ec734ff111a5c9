"""Run a recipe of LLM Foundry by LLM Foundry's own ``train``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from composer import Trainer
from composer.loggers import Logger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moefoundry.config.errors import DataError, UserError
from moefoundry.llm_foundry.fit import Machine, fitted
from moefoundry.llm_foundry.recipe import FoundryRecipe, without_secrets

BUILDERS = {
    "build_tokenizer": "tokenizer",
    "build_scheduler": "scheduler",
    "build_composer_model": "model",
    "build_optimizer": "optimizer",
    "build_dataloader": "train_loader",
    "build_eval_loaders": "eval_loader",
    "build_icl_data_and_gauntlet": "icl_tasks",
    "build_callback": "callbacks",
    "build_logger": "loggers",
    "build_algorithm": "algorithms",
    "process_init_device": "model.init_device",
    "update_batch_size_info": "global_train_batch_size",
}
"""Functions of LLM Foundry, and the key whose value each uses."""
UNKNOWN = "recipe"
_NAMED = ("callbacks", "loggers", "algorithms")
_LOCATIONS = {"TrainDataloader": "train_loader", "EvalDataloader": "eval_loader"}
_RECIPE_ERRORS = (
    *(ValueError, TypeError, LookupError, NameError, AssertionError, NotImplementedError, OSError, ImportError),
    OmegaConfBaseException,
)
"""Errors by which LLM Foundry refuses a recipe before training begins."""


def this_machine() -> Machine:
    """Look at what there is here."""
    return Machine(cuda=torch.cuda.is_available(), flash_attn=find_spec("flash_attn") is not None)


def run(recipe: FoundryRecipe, rank: int = 0) -> Trainer:
    """Train; rank 0 prints a note for each key that was changed.

    Args:
        recipe: A recipe whose keys were checked.
        rank: Number of this process.

    Raises:
        ConfigError: The recipe needs what this machine has not.
        UserError: LLM Foundry refuses the recipe, or its data (DataError).
    """
    tree, notes = fitted(recipe, this_machine())
    if rank == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    os.environ["FSDP_VERSION"] = "2"
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
    module = _llm_foundry()
    try:
        trainer: Trainer = module.train(OmegaConf.create(tree))
    except Exception as error:
        if (said := in_words(error)) is None:
            raise
        raise said from error
    return trainer


def _llm_foundry() -> ModuleType:
    """Import LLM Foundry's training command, and let it log its recipe without secrets."""
    module = importlib.import_module("llmfoundry.command_utils.train")  # the package has a function of this name
    from llmfoundry.utils.config_utils import log_config

    def log_redacted_config(logger: Logger, cfg: dict[str, Any]) -> None:
        log_config(logger, without_secrets(cfg))

    module.log_config = log_redacted_config  # type: ignore[attr-defined]
    return module


def in_words(error: Exception) -> UserError | None:
    """Turn an error of LLM Foundry into one line that names the key, where it is known.

    Returns:
        None for an error in training, or one that no recipe causes.
    """
    from llmfoundry.utils.exceptions import UserError as FoundryUserError

    if isinstance(error, UserError):
        return None
    contextual = isinstance(error, FoundryUserError)
    key, training = _place(error)
    refused = isinstance(error, _RECIPE_ERRORS) or (key != UNKNOWN and isinstance(error, RuntimeError))
    if not contextual and (training or not refused):
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing, or unknown"
    kind = DataError if contextual or "loader" in key else UserError  # data may be bad on one rank alone
    return kind(f"{key}: {text}")


def _place(error: Exception) -> tuple[str, bool]:
    """Find the key that was being used, or :data:`UNKNOWN`; and whether training had begun."""
    key, training = _LOCATIONS.get(str(getattr(error, "location", None)), ""), False
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        key = error.full_key
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        training = training or (module.startswith("composer.") and function in ("fit", "eval"))
        if not key and module.startswith("llmfoundry.") and function in BUILDERS:
            key = BUILDERS[function]
            key += f".{frame.f_locals.get('name')}" if key in _NAMED else ""
    return key or UNKNOWN, training
