"""Recipes of LLM Foundry: recognized, their keys checked, and what changes for this machine."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moefoundry.cli.main import main
from moefoundry.config import ConfigError, load_recipe
from moefoundry.llm_foundry.fit import Machine, fitted
from moefoundry.llm_foundry.keys import TRAIN_KEYS
from moefoundry.llm_foundry.recipe import FoundryRecipe, check_foundry_recipe, read_foundry_recipe
from tests.conftest import QUICKSTART
from tests.llm_foundry import recipes

CPU, GPU = Machine(cuda=False, flash_attn=False), Machine(cuda=True, flash_attn=True)
HF = {"name": "hf_causal_lm", "pretrained_model_name_or_path": "gpt2", "pretrained": True}
PRETRAIN = [(width, layers) for width in (768, 1024, 2048, 4096, 7168) for layers in (12, 24, 48)]
FINETUNING = {"name": "finetuning", "dataset": {"hf_name": "tatsu-lab/alpaca", "split": "train"}, "num_workers": 8}


def read(path: str) -> FoundryRecipe:
    recipe = read_foundry_recipe(path)
    assert recipe is not None
    return recipe


def accepted() -> list[dict[str, Any]]:
    """24 recipes of the kinds that LLM Foundry publishes."""
    pretrain = [recipes.recipe(recipes.mpt(d_model=width, n_layers=layers)) for width, layers in PRETRAIN]
    experts = [recipes.mpt(ffn_config={"ffn_type": name, "moe_num_experts": 4}) for name in ("mb_dmoe", "torch_dmoe")]
    tuning = [recipes.recipe(HF, train_loader=FINETUNING, load_path="x.pt", autoresume=True)]
    tuning += [recipes.recipe(HF | {"peft_config": {"r": 8}}, max_duration="1ep", eval_first=True)]
    tuning += [recipes.recipe({"name": "hf_t5", "pretrained_model_name_or_path": "t5-small"}, tokenizer={"name": "t5"})]
    tuning += [recipes.recipe(HF, eval_loader=[recipes.recipe(HF)["eval_loader"] | {"label": "val"}])]
    tuning += [recipes.recipe(HF, icl_tasks="tasks.yaml", eval_gauntlet="gauntlet.yaml", icl_seq_len=128)]
    tuning += [recipes.recipe(HF, fsdp_config=None, device_train_microbatch_size="auto", save_folder="s3://b/x")]
    tuning += [recipes.recipe(recipes.mpt(ffn_config=recipes.OURS))]
    return [*pretrain, *map(recipes.recipe, experts), *tuning]


REFUSED = {
    "seed: cannot be resolved: Interpolation key 'variables.global_seed' not found": {
        "seed": "${variables.global_seed}"
    },
    "global_seed: no key of LLM Foundry's train recipes.*variables stand under `variables`": {"global_seed": 17},
    "dataset: no key of LLM Foundry's train recipes": {"dataset": {"local": "x"}},
    "icl_seq_length: no key .*did you mean 'icl_seq_len'": {"icl_seq_length": 2048},
}


def test_the_24_are_accepted(tmp_path: Path) -> None:
    trees = accepted()
    assert len(trees) == 24
    for tree in trees:
        found = read(recipes.write(tmp_path, tree))
        check_foundry_recipe(found, 2, allow_code=False)
        for machine in (CPU, GPU):
            changed, notes = fitted(found, machine)
            assert changed.keys() <= TRAIN_KEYS.keys()
            assert notes or not tree["fsdp_config"]
        assert found.tree["max_seq_len"] == 64


@pytest.mark.parametrize("message", REFUSED)
def test_the_4_are_refused_with_the_key_that_is_wrong(tmp_path: Path, message: str) -> None:
    path = recipes.write(tmp_path, recipes.recipe(recipes.mpt(), **REFUSED[message]))
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: 1 error\n  {message}"):
        check_foundry_recipe(read(path), None, allow_code=False)


@pytest.mark.slow  # imports LLM Foundry
def test_the_keys_are_those_of_llm_foundry() -> None:
    from composer.utils.parallelism import FSDP2Config
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS

    from moefoundry.llm_foundry.keys import FSDP2_KEYS

    assert set(TRAIN_KEYS) == TRAIN_CONFIG_KEYS
    assert FSDP2Config.settable_attrs() == FSDP2_KEYS


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"max_duration": None, "optimizer": {"lr": 1}}, {"max_duration", "optimizer.name"}),
        ({"seed": "few", "callbacks": ["lr_monitor"], "progress_bar": [1]}, {"seed", "callbacks", "progress_bar"}),
        ({"eval_loader": [{"name": "text"}]}, {"eval_loader[0].label"}),
        ({"eval_loader": {"dataset": {}}, "eval_loaders": []}, {"eval_loader.name", "eval_loaders"}),
        ({"code_paths": ["mine.py"]}, {"code_paths"}),
        ({"global_train_batch_size": 5}, {"global_train_batch_size"}),
        ({"model": recipes.mpt(ffn_config="mb_dmoe")}, {"model.ffn_config"}),
    ],
)
def test_every_problem_is_named_at_once(tmp_path: Path, changes: dict[str, Any], problems: set[str]) -> None:
    model = {"model": {"name": "${variables.name}"}, "variables": {"name": "mpt_causal_lm", "length": 64}}
    found = read(recipes.write(tmp_path, recipes.recipe(**model | changes)))
    with pytest.raises(ConfigError) as caught:
        check_foundry_recipe(found, 2, allow_code=False)
    assert {problem.path for problem in caught.value.problems} == problems
    if problems == {"code_paths"}:
        check_foundry_recipe(found, 2, allow_code=True)


def test_recipes_of_this_project_are_not_taken(tmp_path: Path) -> None:
    assert read_foundry_recipe(str(QUICKSTART), ["run_name=mpt_causal_lm"]) is None
    assert read_foundry_recipe(None, ["model.name=mpt_causal_lm"]) is None
    assert read_foundry_recipe(str(tmp_path / "mpt_causal_lm.yaml")) is None
    (tmp_path / "bad.yaml").write_text("model: {name: mpt_causal_lm\n")
    assert read_foundry_recipe(str(tmp_path / "bad.yaml")) is None


def test_overrides_and_interpolations_are_llm_foundrys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipes.write(tmp_path, recipes.recipe(recipes.mpt(), seed="${variables.seed}"))
    found = read_foundry_recipe(path, ["variables.seed=3", "model.d_model=64", "loggers.wandb={}"])
    assert found is not None
    assert (found.tree["seed"], found.tree["model"]["d_model"], found.tree["model"]["max_seq_len"]) == (3, 64, 64)
    assert found.tree["loggers"] == {"inmemory": {}, "wandb": {}}
    with pytest.raises(ConfigError, match="--seed: an override is written key=value"):
        read_foundry_recipe(path, ["--seed", "variables.seed=3"])
    monkeypatch.setenv("HIDDEN_THING", "planted")
    with pytest.raises(ConfigError, match=r"run_name: cannot be resolved: Unsupported interpolation type oc\.env"):
        read_foundry_recipe(path, ["run_name=${oc.env:HIDDEN_THING}", "variables.seed=1"])
    assert load_recipe(QUICKSTART, ["run_name=${oc.env:HIDDEN_THING}"]).run_name == "planted"
    assert os.environ["HIDDEN_THING"] == "planted"


def fit(machine: Machine, model: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The changed recipe, and the notes by their keys."""
    tree = recipes.recipe(model, **changes)
    before = copy.deepcopy(tree)
    changed, notes = fitted(FoundryRecipe("r.yaml", tree), machine)
    assert tree == before
    return changed, dict(note.split(": ", 1) for note in notes)


def test_on_a_gpu_with_flash_attention_only_fsdp1_changes() -> None:
    fsdp = {"backward_prefetch": "BACKWARD_PRE", "activation_checkpointing": True, "mixed_precision": "PURE"}
    loader = {"name": "text", "num_workers": 8}
    changed, notes = fit(GPU, recipes.mpt(), fsdp_config=fsdp, train_loader=loader, eval_loader=loader, code_paths=[])
    assert list(notes) == ["fsdp_config.backward_prefetch"]
    kept = {"activation_checkpointing": True, "mixed_precision": "PURE", "state_dict_type": "full"}
    assert changed["fsdp_config"] == kept
    assert "code_paths" not in changed
    expected = recipes.recipe(recipes.mpt(), fsdp_config=kept, train_loader=loader, eval_loader=loader)
    assert changed == expected


def test_on_a_cpu_precision_devices_attention_and_loaders_change() -> None:
    rope = recipes.mpt(attn_config={"rope": True, "attn_impl": "flash"})
    changed, notes = fit(CPU, rope, device_train_microbatch_size="auto", fsdp_config=None)
    assert notes == {
        "precision": "'amp_bf16' becomes 'fp32': Composer trains in fp32 where there is no CUDA device",
        "model.init_device": "'meta' becomes 'cpu': Composer leaves meta for CUDA alone, and there is no CUDA device",
        "device_train_microbatch_size": "'auto' becomes 1: auto waits for a GPU to run out of memory, and there is no "
        "CUDA device",
        "model.attn_config.attn_impl": "'flash' becomes 'torch': flash-attn is not installed",
        "model.attn_config.rope_impl": "'dail' becomes 'hf': flash-attn is not installed",
        "model.loss_fn": "'fused_crossentropy' becomes 'torch_crossentropy': flash-attn is not installed",
        "train_loader.prefetch_factor": "2 becomes null: there are no workers",
        "train_loader.persistent_workers": "true becomes false: there are no workers",
        "eval_loader.prefetch_factor": "2 becomes null: there are no workers",
        "eval_loader.persistent_workers": "true becomes false: there are no workers",
    }
    assert changed["model"]["attn_config"] == {"rope": True, "attn_impl": "torch", "rope_impl": "hf"}
    flash = HF | {"use_flash_attention_2": True, "attn_implementation": "flash_attention_2"}
    changed, notes = fit(CPU, flash, precision="fp32", fsdp_config=None)
    assert (changed["model"]["use_flash_attention_2"], changed["model"]["attn_implementation"]) == (False, "sdpa")
    assert "precision" not in notes


@pytest.mark.parametrize(
    ("strategy", "expected", "note"),
    [
        ("NO_SHARD", None, "fsdp_config"),
        ("FULL_SHARD", {"state_dict_type": "full"}, "fsdp_config.sharding_strategy"),
        ("SHARD_GRAD_OP", {"state_dict_type": "full", "reshard_after_forward": False}, "fsdp_config.sharding_strategy"),
        ("HYBRID_SHARD", {"state_dict_type": "full"}, "fsdp_config.sharding_strategy"),
    ],
)
def test_sharding_strategies(strategy: str, expected: Any, note: str) -> None:
    changed, notes = fit(GPU, HF, fsdp_config={"sharding_strategy": strategy})
    assert changed["fsdp_config"] == expected
    assert note in notes
    assert ("over all ranks" in notes[note]) == (strategy == "HYBRID_SHARD")


def test_expert_parallelism_of_megablocks_needs_cuda() -> None:
    model = recipes.mpt(ffn_config={"ffn_type": "mb_dmoe", "moe_world_size": 2})
    fit(GPU, model)
    with pytest.raises(ConfigError, match=r"model\.ffn_config\.moe_world_size: 2: .*needs CUDA"):
        fit(CPU, model)


def test_validate_says_that_it_is_llm_foundrys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "a" * 34
    secrets = {"variables": {"length": 64, "api_key": "planted"}, "metadata": {"note": token}}
    path = recipes.write(tmp_path, recipes.recipe(recipes.mpt(), code_paths=["mine.py"], **secrets))
    assert main(["validate", path, "seed=3"]) == 0
    out, err = capsys.readouterr()
    assert out == f"OK {path}: a recipe of LLM Foundry: mpt_causal_lm; 20ba of 4 x 64 tokens\n"
    assert "note: code_paths: training runs mine.py with --allow-code-paths\n" in err
    assert "note: fsdp_config.sharding_strategy: 'FULL_SHARD' is dropped" in err
    assert main(["validate", path, "--show"]) == 0
    assert "  api_key: (secret)" in capsys.readouterr().out
    assert main(["validate", path, "--json", "--world-size", "2"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["recipe"]["seed"] == 17
    assert "planted" not in text + out + err
    assert token not in text + out + err
    assert main(["validate", path, "--world-size", "3"]) == 2
    assert "global_train_batch_size: 4 is not divisible by 3 ranks" in capsys.readouterr().err
    assert main(["plan", path, "--world-size", "2"]) == 2
    assert "whose recipes only `train` and `validate` take" in capsys.readouterr().err


def test_code_paths_are_for_llm_foundrys_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(QUICKSTART), "--allow-code-paths"]) == 2
    assert "--allow-code-paths is for recipes of LLM Foundry" in capsys.readouterr().err
