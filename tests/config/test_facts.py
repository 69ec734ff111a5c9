"""What stands beside a key: whether a resumed run may change it, whether it is architecture."""

from functools import cache

from moefoundry.config import MlaConfig, ModelConfig, Recipe, flatten, load_recipe
from moefoundry.config.spec import architecture_of, every_key, is_architecture, is_free_on_resume, walk
from tests.conftest import QUICKSTART

FREE = (
    "format_version",
    *("run_name", "run_dir", "autoresume", "load_path", "load_weights_only", "allow_batch_size_change", "max_duration"),
    "curriculum",
    *("scheduler.timing", "mesh.", "model.moe.backend", "model.moe.dispatch", "lora.base", "activation_checkpointing"),
    "model.linear_attention.backend",
    "fused_kernels",
    "precision.fp8.fsdp_all_gather",
    *(
        "device_train_microbatch_size",
        "device_eval_batch_size",
        "eval_interval",
        "eval_subset_num_batches",
        "save_",
        "dist_timeout",
        "nonfinite",
        "progress_bar",
    ),
    *("log_to_console", "console_log_interval", "callbacks.", "loggers."),
    "launch",
    *("icl_tasks", "eval_gauntlet", "icl_seq_len", "icl_subset_num_batches"),
    *("train_loader.num_workers", "eval_loader.num_workers", "tokenizer.name"),
    *("train_loader.dataset.validate_hash", "eval_loader.dataset.validate_hash"),
    *("train_loader.dataset.local", "train_loader.dataset.remote", "train_loader.dataset.split"),
    *("eval_loader.dataset.local", "eval_loader.dataset.remote", "eval_loader.dataset.split"),
    *(f"train_loader.dataset.streams.NAME.{key}" for key in ("local", "remote", "split")),
    *(f"eval_loader.dataset.streams.NAME.{key}" for key in ("local", "remote", "split")),
)
NOT_ARCHITECTURE = (
    *("model.init.", "model.document_masking", "model.moe.router.input_jitter", "model.moe.balance."),
    *("model.moe.capacity_factor", "model.moe.backend", "model.moe.dispatch", "model.mtp.loss_weight"),
    "model.linear_attention.backend",
    "fused_kernels",
    *("model.attention.indexer.stage", "model.attention.indexer.loss_weight", "model.moe.router.sampled"),
)
RECIPES = (
    [],
    [
        "model.attention.kind=mla",
        "model.attention.yarn={factor: 4, original_max_seq_len: 64}",
        "loggers={wandb: {}, mlflow: {}, tensorboard: {}}",
        "ema={}",
    ],
    ["eval_loader=null", "callbacks={report: null, lr_monitor: null}", "scheduler.name=constant_with_warmup"],
)


@cache
def leaves() -> frozenset[str]:
    keys = {path for path, spec in every_key().items() if not spec.is_mapping}
    return frozenset(keys.union(*(flatten(load_recipe(QUICKSTART, changes)) for changes in RECIPES)))


def test_what_a_resumed_run_may_change():
    """Of every key that a stored recipe can hold; adding to the list is a decision about resuming."""
    assert {key for key in leaves() if is_free_on_resume(key)} == {key for key in leaves() if key.startswith(FREE)}
    for entry in FREE:
        assert any(key.startswith(entry) for key in leaves()), entry


def test_what_a_checkpoint_fixes():
    fixed = {key for key in leaves() if key.startswith("model.") and not key.startswith(NOT_ARCHITECTURE)}
    assert {key for key in leaves() if is_architecture(key)} == fixed
    assert all(path.startswith("model.") for path, spec in walk(Recipe) if not spec.architecture)


def test_keys_that_the_schema_does_not_know_follow_the_mapping_they_stand_in():
    assert is_free_on_resume("callbacks.later.x")
    assert not is_free_on_resume("later")
    assert not is_architecture("model.moe.balance.later")
    assert is_architecture("model.moe.later")
    assert not is_architecture("later")


def test_the_architecture_of_a_model_has_the_rest_at_its_defaults():
    cfg = ModelConfig(d_model=64, document_masking=True, attention=MlaConfig(kv_lora_rank=8))
    cfg.moe.balance.z_loss_weight, cfg.moe.router.scale, cfg.mtp.loss_weight, cfg.mtp.depth = 0.5, 2.0, 0.9, 2
    kept = architecture_of(cfg)
    assert (kept.d_model, kept.attention, kept.moe.router.scale, kept.mtp.depth) == (64, cfg.attention, 2.0, 2)
    assert (kept.document_masking, kept.moe.balance, kept.mtp.loss_weight) == (False, ModelConfig().moe.balance, 0.3)
