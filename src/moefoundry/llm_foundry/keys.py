"""Top-level keys of LLM Foundry 0.22's train YAML, so that a recipe is checked without the imports of LLM Foundry."""

MAPPING, LIST, INTEGER, BOOLEAN = "a mapping", "a list", "an integer", "true or false"
ANY = ""

REQUIRED = (
    *("model", "tokenizer", "optimizer", "scheduler", "train_loader", "max_duration", "max_seq_len"),
    *("global_train_batch_size", "device_train_microbatch_size"),
)
"""Keys without which LLM Foundry stops. It computes ``device_eval_batch_size`` if it is missing."""

TOGETHER_WITH = {"eval_loaders": "eval_loader", "icl_tasks_str": "icl_tasks", "eval_gauntlet_str": "eval_gauntlet"}
"""Keys that LLM Foundry refuses beside another, from which it computes them."""


def _kinds(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


TRAIN_KEYS = {
    **_kinds(MAPPING, "model tokenizer optimizer scheduler train_loader fsdp_config tp_config loggers callbacks"),
    **_kinds(MAPPING, "algorithms compile_config metadata profiler variables"),
    **_kinds(LIST, "code_paths eval_loaders load_ignore_keys save_ignore_keys"),
    **_kinds(INTEGER, "max_seq_len seed max_split_size_mb icl_subset_num_batches icl_seq_len n_gpus"),
    **_kinds(INTEGER, "save_num_checkpoints_to_keep train_subset_num_batches global_train_batch_size"),
    **_kinds(INTEGER, "eval_subset_num_batches"),
    **_kinds(BOOLEAN, "expandable_segments cuda_load_lazy accumulate_train_batch_on_tokens progress_bar"),
    **_kinds(BOOLEAN, "log_to_console log_config save_overwrite save_weights_only load_weights_only"),
    **_kinds(BOOLEAN, "load_strict_model_weights only_hf_checkpoint only_composer_checkpoint spin_dataloaders"),
    **_kinds(BOOLEAN, "eval_first flatten_metadata autoresume"),
    **_kinds(ANY, "device_train_batch_size device_eval_batch_size device_train_microbatch_size dist_timeout"),
    **_kinds(ANY, "device_train_grad_accum max_duration precision eval_interval eval_loader icl_tasks icl_tasks_str"),
    **_kinds(ANY, "eval_gauntlet eval_gauntlet_str python_log_level console_log_interval save_folder run_name"),
    **_kinds(ANY, "save_latest_filename save_filename save_interval load_path"),
}
"""The kind of value of each key; :data:`ANY` is left to LLM Foundry."""

FSDP2_KEYS = {
    *("device_mesh", "reshard_after_forward", "activation_checkpointing", "activation_cpu_offload"),
    *("state_dict_type", "load_monolith_rank0_only", "mixed_precision", "verbose"),
}
"""Keys of ``fsdp_config`` that mean something to Composer's FSDP2."""
