"""``moefoundry migrate``: every key is accounted for, and the new recipe is valid."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from moefoundry.cli.main import main
from moefoundry.config import Recipe, UserError, load_recipe
from moefoundry.config.layers import leaves_of
from moefoundry.llm_foundry.recipe import check_foundry_recipe, read_foundry_recipe
from moefoundry.migration.migrate import migrate_recipe
from moefoundry.migration.report import Fate, Migration
from tests.llm_foundry import recipes
from tests.migration.recipes import GLU, ROPE, axolotl, composer, exact_mpt, hf_directory

SILENT = ("variables", "model.name", "model.attn_config.rope", "model.attn_config.attn_type", "model.no_bias")
SILENT += ("model.ffn_config.ffn_type", "model.ffn_config.mlp_type", "model.ffn_config.ffn_act_fn", "model.pretrained")
"""Keys that the new recipe shows by its form, and that are not listed."""


def moved(tmp_path: Path, tree: dict[str, Any], **options: Any) -> tuple[Migration, Path]:
    """Migrate a recipe; returns the account, and the file of the new recipe."""
    found = migrate_recipe(Path(recipes.write(tmp_path, tree, "old.yaml")), **options)
    path = tmp_path / "new.yaml"
    path.write_text(found.text)
    return found, path


def native(tmp_path: Path, tree: dict[str, Any], **options: Any) -> tuple[Migration, Recipe]:
    """As :func:`moved`, for a recipe that becomes one of this project and lacks nothing."""
    found, path = moved(tmp_path, tree, **options)
    assert found.target == "moefoundry", found
    assert not found.to_fill_in
    assert_accounted_for(found, tree)
    return found, load_recipe(path)


def assert_accounted_for(found: Migration, tree: dict[str, Any]) -> None:
    """Every leaf of the old recipe has one line, unless it says nothing."""
    listed = [line.old for line in found.lines if line.old]
    assert len(listed) == len(set(listed))
    for path, value in leaves_of(tree).items():
        name = ".".join(path)
        if value not in (None, False, 0, -1, {}, []) and not name.startswith(SILENT):
            assert name in listed, name
    assert all(line.why for line in found.lines if line.fate in (Fate.dropped, Fate.default)), found


def whys(found: Migration, fate: Fate) -> dict[str, str]:
    return {line.old or line.new: line.why for line in found.lines if line.fate is fate}


def test_an_mpt_that_can_be_expressed_becomes_a_recipe_of_this_project(tmp_path: Path) -> None:
    changes = {"save_folder": "s3://bucket/run", "max_duration": 2, "eval_interval": "5ba", "run_name": None}
    found, recipe = native(tmp_path, recipes.recipe(exact_mpt(), expandable_segments=True, **changes))
    model = recipe.model
    assert (model.d_model, model.n_layers, model.vocab_size, model.n_dense_layers) == (32, 2, 384, 0)
    assert (model.attention.n_heads, model.attention.n_kv_heads) == (2, 1)  # type: ignore[attr-defined]
    assert (model.attention.rope_theta, model.norm.eps, model.tie_embeddings) == (500000, 1e-5, True)
    assert (model.moe.num_experts, model.moe.top_k, model.moe.expert_hidden_size) == (4, 2, 64)
    balance = model.moe.balance
    assert (balance.aux_loss_weight, balance.z_loss_weight, str(balance.aux_loss_scope)) == (0.025, 0, "micro_batch")
    assert (recipe.max_duration, recipe.max_seq_len, recipe.run_name) == ("2ep", 64, "old")
    assert (str(recipe.precision.compute), str(recipe.scheduler.timing)) == ("bf16", "composer")
    assert (recipe.save_remote, recipe.save_num_checkpoints_to_keep) == ("s3://bucket/run", -1)
    assert recipe.train_loader.dataset.local == "data/old"
    renamed, changed, dropped = (whys(found, fate) for fate in (Fate.renamed, Fate.changed, Fate.dropped))
    assert "model.ffn_config.moe_num_experts" in renamed
    assert changed["model.expansion_ratio"] == "the width itself"
    assert "PYTORCH_ALLOC_CONF" in dropped["expandable_segments"]
    assert "--tokenizer" in dropped["tokenizer.name"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ffn_config": {"ffn_type": "torch_dmoe"} | {k: v for k, v in GLU.items() if k != "ffn_type"}}, (0.0, 0)),
        ({"ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}}}, (0.01, 2)),
        ({"ffn_config": recipes.OURS | {"balance": {"aux_loss_weight": 0.5}}}, (0.5, 0)),
        ({"attention_bias": True, "attn_config": ROPE | {"sliding_window_size": 7, "clip_qkv": 8.0}}, (0.025, 0)),
    ],
)
def test_other_mpts_that_can_be_expressed(tmp_path: Path, changes: dict[str, Any], expected: tuple[float, int]) -> None:
    _, recipe = native(tmp_path, recipes.recipe(exact_mpt(**changes), eval_loader=None))
    assert (recipe.model.moe.balance.aux_loss_weight, recipe.model.n_dense_layers) == expected
    assert recipe.model.attention.window == (8 if "attention_bias" in changes else None)
    assert recipe.eval_loader is None


INEXACT = [
    ({"no_bias": False}, "model.no_bias: false: the FFN has biases"),
    ({"attn_config": {"alibi": True}}, "model.attn_config.rope: false: the model has ALiBi"),
    ({"attn_config": None}, "model.attn_config.rope: false: the model has learned positions"),
    ({"norm_type": "p_norm"}, "model.norm_type: p_norm is no norm here"),
    ({"attn_config": ROPE | {"rope_hf_config": {"type": "linear", "factor": 2.0}}}, "linear: frequencies are scaled"),
    ({"attn_config": ROPE | {"softmax_scale": 0.1}}, "softmax_scale: 0.1"),
    ({"attn_config": ROPE | {"qk_ln": True}}, "queries and keys have an RMSNorm"),
    ({"attn_config": ROPE | {"attn_pdrop": 0.1}}, "attn_pdrop: there is no dropout"),
    ({"ffn_config": GLU | {"mlp_type": "mlp"}}, "mlp: experts have two matrices"),
    ({"ffn_config": GLU | {"ffn_type": "mb_moe"}}, "mlp: experts have two matrices"),
    ({"ffn_config": GLU | {"ffn_act_fn": {"name": "gelu"}}}, "gelu: here every FFN is a SwiGLU"),
    ({"ffn_config": GLU | {"moe_normalize_expert_weights": 2}}, "weights are divided by their sum"),
    ({"ffn_config": GLU | {"shared_expert": True}}, "shared_expert: its weights have another form"),
    ({"ffn_config": None}, "mptmlp: an FFN has two matrices"),
    ({"head_dim": 8}, "head_dim: queries are scaled"),
    ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale: inv_sqrt_d_model"),
    ({"block_overrides": {"order": [], "overrides": {}}}, "block_overrides: all attention is of one kind"),
    ({"emb_pdrop": 0.1}, "emb_pdrop: there is no dropout"),
]


@pytest.mark.parametrize(("changes", "note"), INEXACT, ids=lambda value: value if isinstance(value, str) else "")
def test_other_mpts_stay_llm_foundrys_with_the_reason(tmp_path: Path, changes: dict[str, Any], note: str) -> None:
    tree = recipes.recipe(exact_mpt(**changes))
    found, path = moved(tmp_path, tree)
    assert found.target.startswith("LLM Foundry")
    assert any(note in text for text in found.notes), found.notes
    assert_accounted_for(found, tree)
    kept = read_foundry_recipe(str(path))
    assert kept is not None
    check_foundry_recipe(kept, 2, allow_code=False)
    ffn = changes.get("ffn_config", GLU)
    assert (kept.tree["model"].get("ffn_config") or {}).get("ffn_type") == ("moefoundry_moe" if ffn else None)
    assert "sharding_strategy" not in kept.tree["fsdp_config"]
    assert yaml.safe_load(found.text)["max_seq_len"] == "${variables.length}", "interpolations stay as they are"


def test_experts_of_others_are_swapped_key_by_key(tmp_path: Path) -> None:
    found, path = moved(tmp_path, recipes.recipe(recipes.mpt(ffn_config=GLU | {"mlp_type": "mlp"})))
    assert yaml.safe_load(path.read_text())["model"]["ffn_config"] == {
        "ffn_type": "moefoundry_moe",
        "num_experts": 4,
        "top_k": 2,
        "router": {"normalize_topk": True},
        "balance": {"aux_loss_weight": 0.05, "aux_loss_scope": "micro_batch", "z_loss_weight": 0.0},
    }
    assert any("a SwiGLU of three matrices" in note for note in found.notes)
    assert {line.new for line in found.lines if line.fate is Fate.renamed} == {
        f"model.ffn_config.{name}"
        for name in ("num_experts", "top_k", "router.normalize_topk", "balance.aux_loss_weight")
    }


def test_a_local_hugging_face_model_becomes_its_family(tmp_path: Path) -> None:
    hf = hf_directory(tmp_path / "hf")
    model = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(hf), "use_flash_attention_2": True}
    model |= {"config_overrides": {"rope_theta": 5e5}, "peft_config": {"r": 8, "lora_alpha": 16, "peft_type": "LORA"}}
    found, recipe = native(tmp_path, recipes.recipe(model | {"pretrained": True}))
    assert (recipe.model.moe.num_experts, recipe.model.attention.rope_theta) == (4, 5e5)
    assert (recipe.load_path, recipe.load_weights_only) == ("weights/old", True)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 16)
    assert f"weights: moefoundry convert import {hf} -o weights/old" in found.notes
    _, recipe = native(tmp_path, recipes.recipe(model | {"pretrained": False, "peft_config": None}))
    assert recipe.load_path is None
    found, _ = moved(tmp_path, recipes.recipe(model | {"pretrained_model_name_or_path": "org/model"}))
    assert found.target.startswith("LLM Foundry")
    assert found.notes == [
        "model.pretrained_model_name_or_path: org/model: not on this machine; download it, and name the directory"
    ]


def test_unknown_keys_of_llm_foundry_become_variables_or_go(tmp_path: Path) -> None:
    tree = recipes.recipe(recipes.mpt(), global_seed=3, seed="${global_seed}", dataset={"local": "x"}, optimizer=None)
    found, path = moved(tmp_path, tree)
    new = yaml.safe_load(path.read_text())
    assert (new["seed"], new["variables"]["global_seed"]) == ("${variables.global_seed}", 3)
    assert "dataset" not in new
    assert list(found.to_fill_in) == ["optimizer"]
    assert "#   optimizer: LLM Foundry needs it" in found.text


def test_loaders_schedules_and_parts_without_an_equal(tmp_path: Path) -> None:
    streams = {"a": {"local": "x", "proportion": 0.5, "remote": "s3://b/x"}, "b": {"local": "y", "proportion": 1}}
    loader: dict[str, Any] = {"name": "text", "dataset": {"streams": streams, "max_seq_len": 64}, "drop_last": True}
    only = {"name": "text", "dataset": {"streams": {"a": {"local": "x", "split": "val_small"}}}, "label": "a"}
    changes: dict[str, Any] = {"train_loader": loader, "eval_loader": [only]}
    changes |= {"optimizer": {"name": "decoupled_lionw", "lr": 1e-4}, "scheduler": {"name": "inv_sqrt_with_warmup"}}
    changes |= {"callbacks": {"hf_checkpointer": {"save_interval": "1ep"}, "memory_monitor": {}, "mine": {}}}
    changes |= {"load_path": "ba1.pt", "load_weights_only": True, "precision": "amp_fp16", "algorithms": None}
    changes |= {"fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}, "eval_interval": 2}
    found, path = moved(tmp_path, recipes.recipe(exact_mpt(), **changes))
    recipe = load_recipe(path)
    assert (recipe.optimizer.name, recipe.scheduler.name) == ("adamw", "constant_with_warmup")
    assert recipe.algorithms.gradient_clipping is None
    assert recipe.eval_loader is not None
    assert (recipe.train_loader.dataset.split, recipe.eval_loader.dataset.split) == ("train", "val")
    moved_streams = recipe.train_loader.dataset.streams
    assert moved_streams is not None
    assert {name: (each.local, each.proportion) for name, each in moved_streams.items()} == {
        "a": ("data/small-a", 0.5),
        "b": ("data/small-b", 1.0),
    }
    dropped = whys(found, Fate.dropped)
    assert "convert export" in dropped["callbacks.hf_checkpointer.save_interval"]
    assert "docs/extending.md" in dropped["callbacks.mine"]
    assert "convert import" in dropped["load_path"]
    assert list(found.to_fill_in) == ["mesh.shard"]
    assert recipe.load_path is None


@pytest.mark.parametrize(
    ("config", "gather"),
    [
        ({"sharding_strategy": "SHARD_GRAD_OP"}, "each_step"),
        ({"reshard_after_forward": False}, "each_step"),
        ({"sharding_strategy": "FULL_SHARD", "reshard_after_forward": True}, "each_pass"),
    ],
)
def test_parameters_that_stay_whole_do_so_here(tmp_path: Path, config: dict[str, Any], gather: str) -> None:
    found, path = moved(tmp_path, recipes.recipe(exact_mpt(), fsdp_config=config))
    assert load_recipe(path).mesh.gather == gather
    assert not {name for name in whys(found, Fate.dropped) if name.startswith("fsdp_config")}


def test_a_recipe_of_axolotl(tmp_path: Path) -> None:
    tree = axolotl(hf_directory(tmp_path / "hf"))
    found, recipe = native(tmp_path, tree, world_size=4)
    assert (recipe.global_train_batch_size, recipe.device_train_microbatch_size) == (32, 2)
    assert (recipe.max_duration, recipe.scheduler.t_warmup) == ("3ep", "0.1dur")  # type: ignore[attr-defined]
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (2e-4, [0.9, 0.999])  # type: ignore[attr-defined]
    assert (recipe.model.moe.num_experts, recipe.model.document_masking, recipe.seed) == (4, True, 42)
    assert (recipe.load_path, str(recipe.activation_checkpointing)) == ("weights/old", "full")
    dropped = whys(found, Fate.dropped)
    assert "quantized" in dropped["load_in_4bit"]
    assert "eval_interval" in dropped["evals_per_epoch"]
    assert any("answers.jsonl (alpaca)" in note and "responses" in note for note in found.notes)
    found, _ = moved(tmp_path, axolotl("org/model"))
    assert {"model.d_model", "model.moe.num_experts", "model.attention.n_heads"} <= set(found.to_fill_in)
    assert "not on this machine" in whys(found, Fate.dropped)["base_model"]


def test_a_lone_rate_is_not_the_name_of_an_optimizer(tmp_path: Path) -> None:
    parts = {"optimizers": {"lr": 1e-3}, "schedulers": [{"t_warmup": "9ba"}], "algorithms": None}
    written = yaml.safe_load(moved(tmp_path, composer(**parts))[1].read_text())
    assert written["optimizer"] == {"lr": 1e-3}
    assert written["scheduler"] == {"t_warmup": "9ba"}


def test_a_plain_recipe_in_composers_words(tmp_path: Path) -> None:
    found, path = moved(tmp_path, composer())
    recipe = load_recipe(path)
    assert not found.to_fill_in
    assert (recipe.model.d_model, recipe.model.moe.expert_hidden_size, recipe.global_train_batch_size) == (64, 64, 8)
    assert (recipe.optimizer.weight_decay, str(recipe.activation_checkpointing)) == (0.1, "full")  # type: ignore[attr-defined]
    assert recipe.callbacks.speed_monitor is not None
    assert recipe.callbacks.speed_monitor.window_size == 3
    assert whys(found, Fate.dropped)["model.hidden_act"] == "every FFN is a SwiGLU, whose constants are in model.swiglu"


def test_the_command_hides_secrets_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token, password = "hf_" + "a" * 34, "planted-and-plain"
    secrets: dict[str, Any] = {"loggers": {"wandb": {"group": token, "api_key": password}}}
    secrets["variables"] = {"length": 64, "api_key": password}
    for model in (exact_mpt(), recipes.mpt()):
        old = recipes.write(tmp_path, recipes.recipe(model, **secrets), "old.yaml")
        new = tmp_path / f"{len(model)}.yaml"
        assert main(["migrate", old, "-o", str(new)]) == 0
        shown = capsys.readouterr().out
        assert "still to fill in" in shown or "a secret is not copied" in shown
        assert main(["validate", str(new)]) == 0
        texts = shown + new.read_text() + "".join(capsys.readouterr())
        assert main(["migrate", old, "-o", str(new)]) == 2
        assert "cannot be written: File exists" in capsys.readouterr().err
        assert main(["migrate", old, "-o", str(tmp_path / f"{len(model)}j.yaml"), "--json"]) == 0
        out = capsys.readouterr().out
        assert json.loads(out)["lines"]
        assert token not in texts + out
        assert password not in texts + out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "the top level is a list"),
        ("a: 1", r"no recipe of LLM Foundry \(model\.name\), Composer \(max_duration\) or axolotl \(base_model\)"),
        ("model: {name: moe_causal_lm}", "is a recipe of moefoundry already; `moefoundry validate` checks it"),
        ("extends: a.yaml\nrun_dir: ${run_name}\nmax_duration: 1ba", "is a recipe of moefoundry already"),
        ("format_version: 4\nmax_duration: 1ba", "is a recipe of moefoundry already"),
        ("model: {moe: {top_k: 2}}\nmax_duration: 1ba", "is a recipe of moefoundry already"),
        ("model.moe.top_k: 2\nmax_duration: 1ba", "is a recipe of moefoundry already"),
        ("model: {name: mpt_causal_lm, d_model: wide}", r"model\.d_model: got 'wide'; allowed: a number"),
        ("model: {name: mpt_causal_lm}\nseed: ${nope}", "seed: cannot be resolved"),
        ("base_model: x\nmicro_batch_size: two", "micro_batch_size: got 'two'"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        migrate_recipe(path)
    with pytest.raises(UserError, match="no such recipe file"):
        migrate_recipe(tmp_path / "absent.yaml")


ODD = [None, {}, [], "x", -1, 0, 1.5, True, [1, {"a": 2}], {"name": "q"}, {"a": {"b": 1}}, 10**30, float("nan"), "é\n"]


def test_odd_values_are_refused_or_accounted_for(tmp_path: Path) -> None:
    bases = [recipes.recipe(exact_mpt()), recipes.recipe(recipes.mpt()), axolotl("x"), composer()]
    draw = random.Random(5)
    for _ in range(60):
        tree = copy.deepcopy(draw.choice(bases))
        path = draw.choice([*leaves_of(tree)])
        mapping = tree
        for name in path[: draw.randrange(len(path))]:
            mapping = mapping[name]
        mapping[draw.choice([*mapping])] = draw.choice(ODD)
        try:
            found = migrate_recipe(Path(recipes.write(tmp_path, tree, "old.yaml")))
        except UserError:
            continue
        assert str(found)
        assert yaml.safe_load(found.text)
