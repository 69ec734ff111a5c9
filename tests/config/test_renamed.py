"""Names that users of LLM Foundry, Composer, Hugging Face and torchtitan type lead to the key that is meant."""

from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.config import ConfigError, load_recipe
from moefoundry.config.spec import elsewhere, every_key
from tests.conftest import QUICK, QUICKSTART


def problems_of(*overrides: str, path: Path | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides if path else [*QUICK, *overrides])
    return {
        problem.path: str(replace(problem, file="")).removeprefix(f"{problem.path}: ")
        for problem in caught.value.problems
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.num_experts_per_tok=2", "model.moe.top_k"),
        ("num_experts_per_tok=2", "model.moe.top_k"),
        ("model.moe.moe_top_k=2", "model.moe.top_k"),
        ("model.moe_num_experts=2", "model.moe.num_experts"),
        ("model.moe.n_routed_experts=2", "model.moe.num_experts"),
        ("model.moe.num_local_experts=2", "model.moe.num_experts"),
        ("model.hidden_size=2", "model.d_model"),
        ("model.num_hidden_layers=2", "model.n_layers"),
        ("model.moe_intermediate_size=2", "model.moe.expert_hidden_size"),
        ("model.num_attention_heads=2", "model.attention.n_heads"),
        ("model.num_key_value_heads=2", "model.attention.n_kv_heads"),
        ("model.kv_n_heads=2", "model.attention.n_kv_heads"),
        ("model.rms_norm_eps=1e-5", "model.norm.eps"),
        ("model.rope_theta=1e5", "model.attention.rope_theta"),
        ("model.tie_word_embeddings=true", "model.tie_embeddings"),
        ("vocab_size=300", "model.vocab_size"),
        ("model.max_position_embeddings=64", "max_seq_len"),
        ("global_batch_size=4", "global_train_batch_size"),
        ("training.local_batch_size=4", "device_train_microbatch_size"),
        ("training.seq_len=4", "max_seq_len"),
        ("learning_rate=1e-3", "optimizer.lr"),
        ("parallelism.data_parallel_shard_degree=2", "mesh.shard"),
        ("mesh.expert_parallel_degree=2", "mesh.expert"),
        ("model.moe.routed_scaling_factor=2", "model.moe.router.scale"),
        ("train_loader.dataloader_num_workers=2", "train_loader.num_workers"),
        ("eval_loader.dataloader_num_workers=2", "eval_loader.num_workers"),
        ("resume_from_checkpoint=x", "load_path"),
        ("moe_router_topk=2", "model.moe.top_k"),
        ("num_query_groups=2", "model.attention.n_kv_heads"),
        ("kv_channels=64", "model.attention.head_dim"),
        ("seq_length=64", "max_seq_len"),
        ("moe_ffn_hidden_size=64", "model.moe.expert_hidden_size"),
        ("moe_aux_loss_coeff=0.1", "model.moe.balance.aux_loss_weight"),
        ("moe_z_loss_coeff=0.1", "model.moe.balance.z_loss_weight"),
        ("moe_router_topk_scaling_factor=2", "model.moe.router.scale"),
        ("expert_model_parallel_size=2", "mesh.expert"),
        ("clip_grad=1", "algorithms.gradient_clipping.clipping_threshold"),
        ("rotary_base=1e5", "model.attention.rope_theta"),
        ("init_method_std=0.02", "model.init.std"),
        ("recompute_granularity=full", "activation_checkpointing"),
        ("tokenizer_model=x", "tokenizer.name"),
        ("log_interval=10ba", "console_log_interval"),
        ("wandb_project=x", "loggers.wandb.project"),
        ("lr_decay_style=cosine", "scheduler.name"),
    ],
)
def test_a_name_from_elsewhere_leads_to_the_key_here(override, key):
    problem = problems_of(override)[override.split("=")[0]]
    assert problem == f"unknown key; did you mean {key!r}?"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_name_from_elsewhere_leads_to_the_key_of_a_variant(optimizer):
    problems = problems_of(f"optimizer={{name: {optimizer}, muon_momentum: 0.9}}")
    assert problems == {
        "optimizer.muon_momentum": f"unknown key of name {optimizer!r}; did you mean 'optimizer.momentum'?"
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.intermediate_size=2", "here it is model.ffn_hidden_size or model.moe.expert_hidden_size"),
        ("gradient_accumulation_steps=2", "it follows from device_train_microbatch_size"),
        ("save_folder=x", "a run writes to run_dir"),
        ("save_overwrite=true", "nothing is ever overwritten"),
        ("eval_first=true", "nothing is evaluated before the first batch"),
        ("fsdp_config={sharding_strategy: FULL_SHARD}", "parameters are sharded over mesh.shard ranks"),
        ("steps=100", "max_duration=1000ba"),
        ("training.steps=100", "max_duration=1000ba"),
        ("warmup_steps=100", "scheduler.t_warmup=100ba"),
        ("scheduler.warmup_ratio=0.1", "scheduler.t_warmup=0.05dur"),
        ("optimizer.beta1=0.9", "optimizer.betas=[0.9, 0.95]"),
        ("parallelism.tensor_parallel_degree=2", "there is no tensor parallelism"),
        ("tensor_model_parallel_size=2", "there is no tensor parallelism"),
        ("train_iters=100", "max_duration=1000ba"),
        ("lr_warmup_iters=100", "scheduler.t_warmup=100ba"),
        ("min_lr=1e-5", "scheduler.alpha_f=0.1"),
        ("bf16=true", "precision.compute=bf16"),
        ("fp16=true", "there is no fp16"),
        ("deepspeed=x", "parameters are sharded over mesh.shard ranks"),
        ("overwrite_output_dir=true", "nothing is ever overwritten"),
        ("report_to=wandb", "loggers.wandb={}"),
        ("model.hidden_act=silu", "every FFN is a SwiGLU"),
        ("model.attention_dropout=0", "there is no dropout"),
        ("decoder_sparse_step=2", "model.n_dense_layers and model.dense_layers"),
        ("shared_expert_intermediate_size=64", "model.moe.num_shared_experts counts them"),
        ("seq_aux=true", "model.moe.balance.aux_loss_scope=sequence"),
    ],
)
def test_where_nothing_is_the_same_it_says_what_to_write(override, words):
    assert words in problems_of(override)[override.split("=")[0]]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("precision=amp_bf16", "precision.compute=bf16"),
        ("precision=fp32", "precision.compute=fp32"),
        ("precision=amp_fp16", "precision.compute"),
        ("precision.compute=amp_bf16", "bf16"),
        ("device_train_microbatch_size=aut", "auto"),
        ("activation_checkpointing=true", "full"),
        ("optimizer=AdamW", "optimizer.name=adamw"),
        ("optimizer.name=decoupled_adamw", "adamw"),
        ("optimizer=Muon", "optimizer.name=muon"),
        ("optimizer.name=dist_muon", "muon"),
        ("tokenizer=data/tokenizer", "tokenizer.name=data/tokenizer"),
        ("model.attention.kind=grouped_query_attention", "gqa"),
        ("scheduler.name=linear", "linear_decay_with_warmup"),
    ],
)
def test_values_from_elsewhere(override, suggestion):
    (problem,) = problems_of(override).values()
    assert problem.endswith(f"; did you mean {suggestion!r}?")


def test_a_recipe_of_another_project_is_answered_key_by_key(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(
        f"extends: {QUICKSTART}\n"
        "model: {ffn_config: {moe_num_experts: 8, moe_top_k: 2, other: 3}, attn_config: {rope_theta: 1}}\n"
        "training: {optimizer: {learning_rate: 1}, x: 1}\nunheard: {of: 1}\n"
    )
    found = problems_of(path=path)
    assert list(found) == [
        "model.ffn_config",
        "model.ffn_config.moe_num_experts",
        "model.ffn_config.moe_top_k",
        "model.attn_config",
        "training.optimizer.learning_rate",
        "unheard",
    ]
    assert found["model.ffn_config"] == "unknown key; did you mean 'model.moe'?"
    assert found["training.optimizer.learning_rate"] == "unknown key; did you mean 'optimizer.lr'?"


def test_names_lead_to_keys_that_there_are():
    suffixes = {key.rpartition(".")[2] for key in every_key()}
    for name, other in elsewhere().items():
        assert bool(other.keys) != bool(other.advice), name
        assert set(other.keys) <= every_key().keys()
        on_its_own = {"optimizer", "precision", "scheduler", "tokenizer"}  # a lone value in place of these mappings
        assert name not in suffixes - on_its_own, f"{name} is a key here"
