"""Relations between keys: each broken one is a named error, before any model is built."""

import pytest

from moefoundry.config import ConfigError, check_recipe, load_recipe
from tests.conftest import QUICK, QUICKSTART


def broken(*overrides: str, world_size: int | None = None) -> dict[str, str]:
    """Path -> message of every broken relation (what is not available yet set aside, so that tests outlive it)."""
    try:
        load_recipe(QUICKSTART, overrides, world_size)
    except ConfigError as error:
        return {p.path: str(p) for p in error.problems if "not available yet" not in p.message}
    return {}


def test_row22_top_k_exceeds_num_experts():
    (message,) = broken("model.moe.top_k=17").values()
    assert message == ("model.moe.top_k: 17 experts for each token, but model.moe.num_experts is 16; allowed: 1 to 16")


def test_row22_experts_not_divisible_by_the_expert_degree():
    found = broken("mesh.expert=3", "mesh.shard=6", "global_train_batch_size=6")
    assert found == {
        "mesh.expert": "mesh.expert: 3 does not divide model.moe.num_experts, 16; allowed: 1, 2"  # of 6, too
    }


def test_row22_the_expert_degree_that_is_allowed_divides_experts_and_ranks():
    found = broken("mesh.expert=3", "mesh.replicate=2", "global_train_batch_size=16", world_size=16)
    assert list(found.values()) == [
        "mesh.expert: 3 does not divide model.moe.num_experts, 16, nor mesh.shard, 8 of 16 ranks; allowed: 1, 2, 4, 8"
    ]
    assert broken("mesh.expert=3", "model.moe.num_experts=8") == {
        "mesh.expert": "mesh.expert: 3 does not divide model.moe.num_experts, 8; allowed: 1, 2, 4, 8"
    }


def test_row22_batch_not_divisible_by_the_ranks():
    assert list(broken("global_train_batch_size=9", world_size=2)) == ["global_train_batch_size"]
    found = broken("global_train_batch_size=9", "mesh.shard=2")["global_train_batch_size"]
    assert found.endswith("9 sequences are not divisible by mesh.replicate * mesh.shard, 2; allowed: multiples of 2")


def test_row22_check_recipe_alone():
    recipe = load_recipe(None, QUICK)
    assert check_recipe(recipe) == []
    recipe.mesh.expert = 4
    recipe.model.moe.num_experts = 6
    assert [problem.path for problem in check_recipe(recipe)] == ["mesh.expert"]
    assert [problem.path for problem in check_recipe(recipe, world_size=2)] == ["mesh.expert"]
    assert check_recipe(recipe, world_size=2, skip={"mesh.expert"}) == []


WINDOWED = "model.attention.sliding_window_layers"
WINDOW_ROPE = "model.attention.sliding_window_rope_theta"
YARN, BANDS = "yarn: {factor: 4, original_max_seq_len: 64}", "llama3_rope: {factor: 4}"
LONGROPE = f"original_max_seq_len: 8, short_factors: {[1.0] * 16}, long_factors: {[2.0] * 16}"
INDEXER = "model.attention={kind: mla, n_heads: 4, q_lora_rank: 24, indexer: {stage: warm_up}}"
LINEAR = "model.linear_attention={{n_key_heads: 2, n_value_heads: 2, layers: {}}}"
NARROW = ["model.moe.expert_hidden_size=36", "precision.compute=bf16"]
DEEPGEMM = ["precision.fp8.recipe=deepseek_v3", "precision.fp8.backend=deepgemm"]
BLOCKS = ["model.moe.backend=megablocks", "model.moe.expert_hidden_size=128"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "paths"),
    [
        (["model.n_dense_layers=7"], None, ["model.n_dense_layers"]),
        (["model.n_dense_layers=6"], None, []),
        (["model.dense_layers=[2,6,9]"], None, ["model.dense_layers"]),
        (["model.dense_layers=[5]"], None, []),
        (["model.d_model=260"], None, ["model.attention.n_heads"]),  # 8 heads do not divide it
        (["model.d_model=40"], None, ["model.attention.n_heads"]),  # heads of width 5
        (["model.d_model=48"], None, []),
        (["model.attention.n_kv_heads=3"], None, ["model.attention.n_kv_heads"]),
        (["model.attention.n_kv_heads=16"], None, ["model.attention.n_kv_heads"]),
        (["ema.evaluate=true"], None, []),
        (["ema.evaluate=true", "eval_loader=null"], None, ["ema.evaluate"]),
        (["ema={}", "eval_loader=null"], None, []),
        # moments that are rounded to the nearest BF16 must be able to fall
        (["precision.optimizer_moments=bf16", "optimizer.betas=[0.9, 0.99609375]"], None, []),
        (["precision.optimizer_moments=bf16", "optimizer.betas=[0.9, 0.999]"], None, ["optimizer.betas[1]"]),
        (["precision.optimizer_moments=bf16", "optimizer.betas=[0.997, 0.95]"], None, ["optimizer.betas[0]"]),
        (["precision.optimizer_moments=bf16_stochastic", "optimizer.betas=[0.9, 0.999]"], None, []),
        (["optimizer.betas=[0.9, 0.999]"], None, []),
        (["optimizer={name: muon, betas: [0.9, 0.999]}"], None, []),
        (["precision.optimizer_moments=bf16", "optimizer.name=muon"], None, ["precision.optimizer_moments"]),
        # a head's width that is given, or that of its part with position
        (["model.d_model=260", "model.attention.head_dim=32"], None, []),
        (["model.attention.head_dim=33"], None, ["model.attention.head_dim"]),
        (["model.attention={kind: mla, n_heads: 7}"], None, []),
        (["model.attention={kind: mla, qk_rope_head_dim: 33}"], None, ["model.attention.qk_rope_head_dim"]),
        (["model.attention.yarn={factor: 4, original_max_seq_len: 64, beta_fast: 2, beta_slow: 2}"], None, []),
        (
            ["model.attention.yarn={factor: 4, original_max_seq_len: 64, beta_fast: 2, beta_slow: 3}"],
            None,
            ["model.attention.yarn.beta_fast"],
        ),
        # windows in some blocks
        (["model.attention.sliding_window=8", f"{WINDOWED}=[0,5]"], None, []),
        ([f"{WINDOWED}=[0]"], None, [WINDOWED]),
        *(
            (["model.attention.sliding_window=8", f"{WINDOWED}={blocks}"], None, [WINDOWED])
            for blocks in ("[]", "[2,6]")
        ),
        # rotary embeddings of some blocks
        (["model.attention.unrotated_layers=[0,5]"], None, []),
        (["model.attention.unrotated_layers=[0,6]"], None, ["model.attention.unrotated_layers"]),
        (["model.attention.sliding_window=8", f"{WINDOW_ROPE}=5"], None, []),
        ([f"{WINDOW_ROPE}=5"], None, [WINDOW_ROPE]),
        ([f"model.attention={{{YARN}, {BANDS}}}"], None, ["model.attention.llama3_rope"]),
        ([f"model.attention.longrope={{{LONGROPE}}}"], None, []),
        (
            [f"model.attention.longrope={{{LONGROPE}}}", "model.attention.head_dim=16"],
            None,
            ["model.attention.longrope.long_factors", "model.attention.longrope.short_factors"],
        ),
        # indexers that train
        ([INDEXER], None, []),
        ([INDEXER, LINEAR.format("[0,1,2,3,4]")], None, []),
        ([INDEXER, LINEAR.format("[0,1,2,3,4,5]")], None, ["model.attention.indexer.stage"]),
        ([INDEXER, LINEAR.format("[0,1,2,3,4,5]"), "model.mtp.depth=1"], None, []),
        # routing by groups
        (["model.moe.router={num_groups: 3}"], None, ["model.moe.router.num_groups"]),
        (["model.moe.router={num_groups: 4, top_k_groups: 5}"], None, ["model.moe.router.top_k_groups"]),
        (["model.moe.router={num_groups: 1, top_k_groups: 2}"], None, ["model.moe.router.top_k_groups"]),
        (["model.moe.router={num_groups: 4, top_k_groups: 1}", "model.moe.top_k=4"], None, []),
        (
            ["model.moe.router={num_groups: 4, top_k_groups: 1}", "model.moe.top_k=5"],
            None,
            ["model.moe.router.top_k_groups"],
        ),
        (["model.moe.router={num_groups: 16, top_k_groups: 2}"], None, []),
        (
            ["model.moe.router={num_groups: 16, top_k_groups: 2, score_function: sigmoid}"],
            None,
            ["model.moe.router.num_groups"],
        ),
        (
            ["model.moe.router={num_groups: 16, top_k_groups: 2}", "model.moe.balance.bias_update_rate=1e-3"],
            None,
            ["model.moe.router.num_groups"],
        ),
        # multi-token prediction
        (["model.mtp.depth=510"], None, []),
        (["model.mtp.depth=511"], None, ["model.mtp.depth"]),
        # grouped_mm: rows of whole 16 bytes
        (["model.moe.expert_hidden_size=30"], None, ["model.moe.expert_hidden_size"]),
        (["model.moe.expert_hidden_size=30", "model.moe.backend=loop"], None, []),
        (["model.moe.expert_hidden_size=36"], None, []),
        (NARROW, None, ["model.moe.expert_hidden_size"]),
        (["model.moe.expert_hidden_size=36", "precision.compute=bf16_emulated"], None, []),
        (["model.d_model=6", "model.attention={n_heads: 1, n_kv_heads: 1}"], None, ["model.d_model"]),
        # megablocks: blocks of 128 x 128, products as they are
        ([*BLOCKS], None, []),
        ([*BLOCKS, "precision.compute=bf16"], None, []),
        ([*BLOCKS, "model.moe.expert_hidden_size=192"], None, ["model.moe.expert_hidden_size"]),
        ([*BLOCKS, "model.d_model=64"], None, ["model.d_model"]),
        ([*BLOCKS, "precision.compute=bf16_emulated"], None, ["model.moe.backend"]),
        ([*BLOCKS, "precision.fp8.recipe=deepseek_v3"], None, ["model.moe.backend"]),
        (["model.moe.backend=quack"], None, ["model.moe.backend"]),
        (["model.moe.backend=quack", "precision.compute=bf16"], None, []),
        (["model.moe.backend=quack", *NARROW], None, ["model.moe.expert_hidden_size"]),
        (["model.moe.dispatcher=deepep"], None, ["model.moe.dispatcher"]),
        (["model.moe.dispatcher=deepep", "precision.compute=bf16"], None, []),
        # deepgemm: BF16, rows of whole 16 bytes
        ([*DEEPGEMM, "precision.compute=bf16"], None, []),
        (DEEPGEMM, None, ["precision.fp8.backend"]),
        ([*DEEPGEMM, "precision.fp8.recipe=rowwise"], None, ["precision.fp8.backend"]),
        ([*DEEPGEMM, "precision.compute=bf16", "model.moe.expert_hidden_size=24"], None, [NARROW[0].partition("=")[0]]),
        # mesh
        (["mesh.replicate=-1"], None, ["mesh.shard"]),
        (["mesh.replicate=-1", "mesh.shard=2"], 4, []),
        (["mesh.replicate=-1", "mesh.shard=3"], 4, ["mesh.shard"]),
        (["mesh.replicate=3"], 4, ["mesh.replicate"]),
        (["mesh.replicate=2", "mesh.shard=2"], 4, []),
        (["mesh.replicate=2", "mesh.shard=2", "global_train_batch_size=8"], 8, ["mesh.shard"]),
        (["mesh.shard=0"], 4, ["mesh.shard"]),
        (["mesh.replicate=0", "mesh.shard=-1"], 4, ["mesh.replicate"]),
        (["mesh.expert=4", "mesh.replicate=2"], 4, ["mesh.expert"]),  # shard is 2
        (["mesh.expert=4", "mesh.shard=-1"], 4, []),
        (["mesh.expert=4", "mesh.shard=-1"], None, []),  # cannot be known yet
        # batch: only the ranks must divide it
        (["global_train_batch_size=12", "device_train_microbatch_size=8"], 2, []),
        (["global_train_batch_size=10", "device_train_microbatch_size=4"], 2, []),
        (["global_train_batch_size=6", "mesh.replicate=4"], None, ["global_train_batch_size"]),
        # sequence length
        (["train_loader.dataset.max_seq_len=256"], None, ["train_loader.dataset.max_seq_len"]),
        (["eval_loader.dataset.max_seq_len=256"], None, ["eval_loader.dataset.max_seq_len"]),
        (["max_seq_len=256"], None, []),
        (["max_seq_len=256", "eval_loader=null"], None, []),
        # retention
        (["save_keep_best=metrics/eval/LanguageCrossEntropy"], None, []),
        (["save_keep_best=metrics/eval/LanguageCrossEntropy", "eval_loader=null"], None, ["save_keep_best"]),
        (["save_keep_best=loss/train/mtp", "model.mtp.depth=1"], None, []),
        (["save_keep_best=loss/train/mtp"], None, ["save_keep_best"]),
        (["save_num_checkpoints_to_keep=-1"], None, []),
        (["save_num_checkpoints_to_keep=0"], None, ["save_num_checkpoints_to_keep"]),
        # where a run begins
        (["load_weights_only=true", "load_path=runs/other"], None, []),
        (["load_weights_only=true"], None, ["load_weights_only"]),
        # schedule
        (["max_duration=10ba", "scheduler.t_warmup=20ba"], None, ["scheduler.t_warmup"]),
        (["max_duration=20ba", "scheduler.t_warmup=20ba"], None, []),
        (["max_duration=1ep"], None, []),
        (["scheduler.t_warmup=0.5dur"], None, []),
        (["scheduler.t_warmup=1.5dur"], None, ["scheduler.t_warmup"]),
        (["scheduler.t_warmup=10tok"], None, ["scheduler.t_warmup"]),
        (["scheduler.t_warmup=10sp", "max_duration=2000tok"], None, ["scheduler.t_warmup"]),
        (["scheduler.t_warmup=1ba", "max_duration=2000tok"], None, ["scheduler.t_warmup"]),
        (["scheduler={name: constant_with_warmup, t_warmup: 5tok}"], None, ["scheduler.t_warmup"]),
        (["scheduler.t_warmup=10ba", "max_duration=1ep"], None, []),
        (["scheduler.t_warmup=1ep", "max_duration=1000ba"], None, []),
        (["scheduler.t_warmup=10tok", "max_duration=2000tok"], None, []),
        (["scheduler.t_warmup=0.1dur", "max_duration=2000sp"], None, []),
        # seeds: one more for each rank
        (["seed=4294967295"], None, []),
        (["seed=4294967295"], 2, ["seed"]),
        (["seed=4294967295", "mesh={replicate: 2, shard: 2}"], None, ["seed"]),
        (["seed=4294967292"], 4, []),
    ],
)
def test_row22_relations(overrides, world_size, paths):
    assert sorted(broken(*overrides, world_size=world_size)) == paths


def test_grouped_mm_suggests_the_loop_backend():
    assert (
        "did you mean 'model.moe.backend=loop'?"
        in broken("model.moe.expert_hidden_size=30")["model.moe.expert_hidden_size"]
    )


def test_ways_of_fp8_without_fp8_are_refused():
    found = broken("precision.fp8={exclude: [lm_head, layers.0], backend: reference}")
    assert found == {
        "precision.fp8.exclude": "precision.fp8.exclude: ['lm_head', 'layers.0'] has no effect while "
        "precision.fp8.recipe is null; allowed: ['lm_head', '*.router.gate']",
        "precision.fp8.backend": "precision.fp8.backend: 'reference' has no effect while precision.fp8.recipe is null; "
        "allowed: null",
    }
    defaults = "exclude: [lm_head, '*.router.gate'], backend: null"
    assert broken(f"precision.fp8={{recipe: null, {defaults}}}") == {}
    assert broken("precision.fp8={recipe: rowwise, exclude: [layers.0], backend: reference}") == {}


def test_a_metric_that_is_mistyped_is_named_with_those_that_there_are():
    message = broken("save_keep_best=metrics/eval/LanguageCrossEntropie")["save_keep_best"]
    assert "'metrics/eval/LanguageCrossEntropie' is no loss that this run measures" in message
    assert "allowed: metrics/eval/LanguageCrossEntropy, loss/train/total, loss/train/lm" in message
    assert "did you mean 'metrics/eval/LanguageCrossEntropy'?" in message


def test_nothing_is_said_about_keys_that_are_wrong_in_themselves():
    assert list(broken("model.moe.top_k=17", "model.moe.num_experts=x")) == ["model.moe.num_experts"]
    assert list(broken("model.moe.top_k=17", "model.moe.num_expert=32")) == ["model.moe.num_expert"]


def test_several_relations_at_once():
    found = broken("model.moe.top_k=17", "model.n_dense_layers=9", "scheduler.t_warmup=201ba", "mesh.shard=3")
    assert set(found) == {"model.moe.top_k", "model.n_dense_layers", "scheduler.t_warmup", "global_train_batch_size"}


def test_a_batch_that_is_missing_or_wrong_is_named_on_any_number_of_ranks(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(line for line in QUICKSTART.read_text().splitlines() if "global_train_batch" not in line))
    with pytest.raises(ConfigError, match="global_train_batch_size: missing"):
        load_recipe(path, world_size=3)
    with pytest.raises(ConfigError, match="global_train_batch_size: null is not allowed"):
        load_recipe(QUICKSTART, ["global_train_batch_size=null"], world_size=3)
