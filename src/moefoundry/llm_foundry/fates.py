"""The fate of each key of LLM Foundry's train YAML in a recipe of this project.

``python -m moefoundry.llm_foundry.fates`` prints the table of ``docs/llm_foundry.md``.
"""

from __future__ import annotations

from typing import NamedTuple

SET_BY_LLM_FOUNDRY = "LLM Foundry computes it; recipes do not say it"
ONE_FORMAT = "checkpoints are directories of one format, which any number of ranks reads"


class Fate(NamedTuple):
    """Fate of a key.

    Attributes:
        ours: Keys here, as they are written in the documentation; empty if there is none.
        text: What is different, or why there is none.
    """

    ours: str
    text: str = ""


FATES = {
    "model": Fate("model", "an MPT, where it can be expressed; a local Hugging Face model by its family"),
    "tokenizer": Fate("tokenizer.name", "prepared data hold it: `moefoundry prepare --tokenizer`"),
    "optimizer": Fate("optimizer", "decoupled weight decay is divided by the peak rate"),
    "scheduler": Fate("scheduler", "with `timing: composer`; the last rate of a cosine is said"),
    "train_loader": Fate("train_loader", "data are prepared once"),
    "eval_loader": Fate("eval_loader", "the first of several"),
    "max_duration": Fate("max_duration", "an integer becomes epochs"),
    "max_seq_len": Fate("max_seq_len"),
    "global_train_batch_size": Fate("global_train_batch_size"),
    "device_train_microbatch_size": Fate("device_train_microbatch_size"),
    "device_eval_batch_size": Fate("device_eval_batch_size"),
    "device_train_batch_size": Fate("", SET_BY_LLM_FOUNDRY),
    "device_train_grad_accum": Fate("", SET_BY_LLM_FOUNDRY),
    "n_gpus": Fate("", SET_BY_LLM_FOUNDRY),
    "eval_loaders": Fate("", SET_BY_LLM_FOUNDRY),
    "icl_tasks_str": Fate("", SET_BY_LLM_FOUNDRY),
    "eval_gauntlet_str": Fate("", SET_BY_LLM_FOUNDRY),
    "seed": Fate("seed"),
    "precision": Fate("precision.compute", "`amp_bf16`, also where it is not said, becomes `bf16`"),
    "fsdp_config": Fate("mesh, activation_checkpointing", "parameters are sharded over `mesh.shard` ranks"),
    "tp_config": Fate("", "there is no tensor parallelism; `mesh` has replicate, shard and expert"),
    "compile_config": Fate("compile", "true compiles attention, router and dense FFNs"),
    "dist_timeout": Fate("dist_timeout"),
    "accumulate_train_batch_on_tokens": Fate("", "losses are always means over the tokens of the whole batch"),
    "eval_interval": Fate("eval_interval", "an integer becomes epochs; 0 becomes `eval_loader: null`"),
    "eval_first": Fate("", "nothing is evaluated before the first batch"),
    "eval_subset_num_batches": Fate("eval_subset_num_batches"),
    "train_subset_num_batches": Fate("", "an epoch is all of the data; `max_duration` says how long to train"),
    "spin_dataloaders": Fate("", "a resumed run goes on at its sample without reading those before"),
    "icl_tasks": Fate("icl_tasks"),
    "icl_seq_len": Fate("icl_seq_len"),
    "icl_subset_num_batches": Fate("icl_subset_num_batches"),
    "eval_gauntlet": Fate("eval_gauntlet"),
    "loggers": Fate("loggers", "those that are installed, with the keys that they have"),
    "callbacks": Fate("callbacks", "those that are installed, with the keys that they have"),
    "algorithms": Fate("algorithms", "without `gradient_clipping` nothing is clipped: it becomes null"),
    "progress_bar": Fate("progress_bar"),
    "log_to_console": Fate("log_to_console"),
    "console_log_interval": Fate("console_log_interval"),
    "python_log_level": Fate("", "messages of this project are few, and errors one line"),
    "log_config": Fate("", "`run_dir` has the resolved recipe"),
    "metadata": Fate("", "put it into `run_name`, or into the tags of a tracker"),
    "flatten_metadata": Fate("", "there is no `metadata`"),
    "profiler": Fate("", "there is none; a callback of your own may run `torch.profiler`: docs/extending.md"),
    "variables": Fate("", "their values stand where they were used; `${key}` refers to any key of the recipe"),
    "run_name": Fate("run_name", "the name of the file where it is not said"),
    "autoresume": Fate("autoresume"),
    "save_folder": Fate("save_remote", "where it is a URL; checkpoints are in `run_dir/checkpoints`"),
    "save_interval": Fate("save_interval", "an integer becomes epochs"),
    "save_num_checkpoints_to_keep": Fate("save_num_checkpoints_to_keep", "-1, LLM Foundry's default, is said"),
    "save_filename": Fate("", "checkpoints are `run_dir/checkpoints/ba100`, `ba200`, ..."),
    "save_latest_filename": Fate("", "a run's directory stands for its newest checkpoint wherever one is named"),
    "save_overwrite": Fate("", "nothing is ever overwritten"),
    "save_weights_only": Fate("", "`convert consolidate` writes the weights alone"),
    "save_ignore_keys": Fate("", ONE_FORMAT),
    "load_path": Fate("load_path", "after `moefoundry convert import`"),
    "load_weights_only": Fate("load_weights_only", "an imported checkpoint has nothing but weights"),
    "load_strict_model_weights": Fate("", "a checkpoint must have every weight of the model"),
    "load_ignore_keys": Fate("", "a checkpoint must have every weight of the model"),
    "only_hf_checkpoint": Fate("", ONE_FORMAT),
    "only_composer_checkpoint": Fate("", ONE_FORMAT),
    "code_paths": Fate("", "no code of a recipe runs; parts come from installed packages: docs/extending.md"),
    "max_split_size_mb": Fate("", "torch reads it from the environment variable PYTORCH_ALLOC_CONF"),
    "expandable_segments": Fate("", "torch reads it from the environment variable PYTORCH_ALLOC_CONF"),
    "cuda_load_lazy": Fate("", "CUDA reads it from the environment variable CUDA_MODULE_LOADING"),
}
"""Each key of LLM Foundry's ``TrainConfig``."""


def table() -> str:
    """Write the table of all keys as Markdown."""
    lines = ["| LLM Foundry | here | |", "|---|---|---|"]
    for name, fate in sorted(FATES.items()):
        ours = ", ".join(f"`{key}`" for key in fate.ours.split(", ")) if fate.ours else "-"
        lines.append(f"| `{name}` | {ours} | {fate.text} |")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
