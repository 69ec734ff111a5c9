"""Checkpoints of Composer's trainer: names of their tensors, what is refused, and nothing of it is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import save as save_shards

from moefoundry import config
from moefoundry.checkpoint.weights import load_model
from moefoundry.cli.main import main
from moefoundry.config import UserError, load_recipe
from moefoundry.migration.import_foreign import import_foreign
from moefoundry.model.transformer import meta_model
from tests.llm_foundry import recipes
from tests.migration.recipes import GLU, ROPE, exact_mpt

E, F, D, V = 4, 64, 32, 384


def mpt_state(fused: bool = True, layers: int = 2) -> dict[str, Tensor]:
    """Tensors of ``exact_mpt``, as a Composer model of LLM Foundry names them."""
    torch.manual_seed(0)
    state = {"transformer.wte.weight": torch.randn(V, D), "transformer.norm_f.weight": torch.randn(D)}
    for index in range(layers):
        block = f"transformer.blocks.{index}"
        state |= {f"{block}.norm_{norm}.weight": torch.randn(D) for norm in (1, 2)}
        q, k, v = torch.randn(D, D), torch.randn(D // 2, D), torch.randn(D // 2, D)
        weights = {"Wqkv": torch.cat([q, k, v])} if fused else {"Wq": q, "Wk": k, "Wv": v}
        state |= {f"{block}.attn.{name}.weight": weight for name, weight in weights.items()}
        state |= {f"{block}.attn.out_proj.weight": torch.randn(D, D)}
        state |= {f"{block}.ffn.router.layer.weight": torch.randn(E, D)}
        state |= {f"{block}.ffn.experts.mlp.{name}": torch.randn(E * F, D) for name in ("w1", "v1", "w2")}
    return {f"model.{name}": tensor for name, tensor in state.items()}


def monolithic(path: Path, model: Any, hf: dict[str, Any] | None = None, **more: Any) -> Path:
    """A file as Composer writes it, with the config of the Hugging Face model in it."""
    state: dict[str, Any] = {"model": model, "timestamp": {"iteration": 1}} | more
    if hf is not None:
        state["integrations"] = {"huggingface": {"model": {"config": {"content": hf}}}}
    torch.save({"state": state, "rng": []}, path)
    return path


def config_of(model: dict[str, Any]) -> dict[str, Any]:
    """The config of an MPT in such a file."""
    config = model | {"model_type": "mpt", "architectures": ["MPTForCausalLM"], "max_seq_len": 64}
    return {name: value for name, value in config.items() if name != "name"}


def test_experts_and_attention_find_their_places(tmp_path: Path) -> None:
    for fused in (True, False):
        state = mpt_state(fused)
        file = monolithic(tmp_path / f"{fused}.pt", state, config_of(exact_mpt()))
        summary = import_foreign(file, tmp_path / f"{fused}")
        model = load_model(summary.path)
        block = "model.transformer.blocks.1"
        experts = model.layers[1].ffn.experts
        for name, theirs in (("gate_proj", "w1"), ("up_proj", "v1")):
            torch.testing.assert_close(getattr(experts, name), state[f"{block}.ffn.experts.mlp.{theirs}"].view(E, F, D))
        down = state[f"{block}.ffn.experts.mlp.w2"].view(E, F, D).transpose(1, 2)
        torch.testing.assert_close(experts.down_proj.data, down)
        attention: Any = model.layers[1].attention
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        names = ("Wqkv",) if fused else ("Wq", "Wk", "Wv")
        torch.testing.assert_close(qkv.data, torch.cat([state[f"{block}.attn.{name}.weight"] for name in names]))
        assert model.lm_head.weight is model.embed_tokens.weight
    recipe = load_recipe(tmp_path / "True" / "recipe.yaml")
    assert (recipe.load_path, recipe.model.moe.num_experts) == (str(tmp_path / "True"), E)


def test_shards_of_several_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "ep0-ba2"
    state = {"model": mpt_state(), "timestamp": {"Timestamp": "of some class"}, "rank_zero_seed": 3}
    save_shards({"state": state}, checkpoint_id=shards, no_dist=True)
    recipe = recipes.write(tmp_path, recipes.recipe(exact_mpt()))
    assert main(["convert", "import", str(shards), "-o", str(tmp_path / "out"), "--recipe", recipe]) == 0
    model = load_model(tmp_path / "out")
    torch.testing.assert_close(model.embed_tokens.weight.data, state["model"]["model.transformer.wte.weight"])
    assert main(["convert", "import", str(shards), "-o", str(tmp_path / "other")]) == 2
    assert "give the recipe that trained it: --recipe FILE" in capsys.readouterr().err


def test_our_model_in_a_recipe_of_llm_foundry(tmp_path: Path) -> None:
    keys = {"vocab_size": V, "d_model": D, "n_layers": 1, "attention": {"n_heads": 2, "n_kv_heads": 1}}
    keys |= {"moe": {"num_experts": E, "top_k": 2, "expert_hidden_size": F}}
    recipe = recipes.write(tmp_path, recipes.recipe({"name": "moe_causal_lm", "seed": 3} | keys))
    torch.manual_seed(0)
    tensors = meta_model(config.load_model(keys)).state_dict()
    state = {f"model.{name}": torch.randn(each.shape) for name, each in tensors.items()}
    file = monolithic(tmp_path / "ours.pt", state)
    import_foreign(file, tmp_path / "out", recipe=Path(recipe))
    torch.testing.assert_close(load_model(tmp_path / "out").lm_head.weight.data, state["model.lm_head.weight"])


class Evil:
    """Makes a directory where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    file = monolithic(tmp_path / "evil.pt", mpt_state(), config_of(exact_mpt()), callbacks=Evil(proof))
    with pytest.raises(UserError, match=r"evil\.pt: unreadable checkpoint: posix\.mkdir does not belong there"):
        import_foreign(file, tmp_path / "out")
    shards = tmp_path / "shards"
    save_shards({"state": {"model": mpt_state()}}, checkpoint_id=shards, no_dist=True)
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata.planner_data = Evil(proof)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    recipe = Path(recipes.write(tmp_path, recipes.recipe(exact_mpt())))
    with pytest.raises(UserError, match=r"unreadable checkpoint metadata: posix\.mkdir does not belong there"):
        import_foreign(shards, tmp_path / "out", recipe=recipe)
    metadata.planner_data = None
    metadata.storage_data = {key: _moved(place) for key, place in metadata.storage_data.items()}
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"'\.\./elsewhere' is no file of the checkpoint; refused"):
        import_foreign(shards, tmp_path / "out", recipe=recipe)
    assert not proof.exists()
    assert not (tmp_path / "out").exists()


def _moved(place: Any) -> Any:
    place.relative_path = "../elsewhere"
    return place


@pytest.mark.parametrize(
    ("model", "state", "message"),
    [
        (exact_mpt(ffn_config=GLU | {"mlp_type": "mlp"}), {}, "mlp: experts have two matrices, and here three"),
        (exact_mpt(attn_config=ROPE | {"rope": False}), {}, "the model has learned positions"),
        (exact_mpt(n_layers=3), {}, r"transformer\.blocks\.2\.norm_1\.weight: missing"),
        (exact_mpt(), {"model.lm_head.weight": torch.zeros(V, D)}, "tensors that must be copies are not"),
        (exact_mpt(), {"model.head": torch.zeros(1)}, "head: not expected"),
        (exact_mpt(), {"model.transformer.wte.weight": 3}, r"it has no state\.model with tensors"),
        (exact_mpt(), None, r"it has no state\.model with tensors"),
        (None, {}, "it does not tell its model"),
    ],
    ids=["mlp", "positions", "missing", "untied", "unexpected", "no tensors", "no model", "no config"],
)
def test_what_stands_in_the_way_is_named(tmp_path: Path, model: Any, state: Any, message: str) -> None:
    stored = mpt_state() | state if state is not None else 3
    file = monolithic(tmp_path / "x.pt", stored, config_of(model) if model else None)
    with pytest.raises(UserError, match=message):
        import_foreign(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_and_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="unreadable checkpoint: not what torch"):
        import_foreign(bad, tmp_path / "out")
    assert main(["convert", "import", str(bad), "-o", str(tmp_path / "out"), "--verify"]) == 2
    assert main(["convert", "import", str(tmp_path), "-o", str(tmp_path / "out"), "--recipe", str(bad)]) == 2
    assert "--recipe is for checkpoints of Composer" in capsys.readouterr().err
