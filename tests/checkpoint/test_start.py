"""What a run may begin with, by the small files of a checkpoint; with training: ``tests/train/test_phases.py``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.checkpoint.manifest import STATE_FILE, WEIGHTS_ONLY, Origin, commit, write_synced
from moefoundry.checkpoint.run_dir import claim_run_dir, open_run, store_of
from moefoundry.checkpoint.start import Start, check_start, data_digests, known_digests
from moefoundry.config import Recipe, UserError, flatten, load_recipe
from moefoundry.config.versions import FORMAT_VERSION
from tests.conftest import QUICKSTART

MakeRecipe = Callable[..., Recipe]
DIGESTS = {"train_loader.dataset": "a" * 64, "eval_loader.dataset": "b" * 64, "tokenizer": "c" * 64}
TIMESTAMP = {"epoch": 0, "batch": 4, "sample": 16, "token": 8192}


@pytest.fixture
def recipe(tmp_path: Path) -> MakeRecipe:
    return lambda name, *changes: load_recipe(QUICKSTART, [f"run_dir={tmp_path / name}", f"run_name={name}", *changes])


def save(made: Recipe, **changes: Any) -> Path:
    """A checkpoint of batch 4 without tensors; a change of None leaves a key of its state out."""
    state = {
        "timestamp": TIMESTAMP,
        "data": {"sample_in_epoch": 16, "shuffle_seed": 17},
        "world_size": 1,
        "recipe": flatten(made),
        "lr": 0.004,
        "data_digests": DIGESTS,
    } | changes
    store = store_of(Path(made.run_dir))
    directory = store.begin(4)
    content = json.dumps({key: value for key, value in state.items() if value is not None}).encode()
    commit(directory, Origin(4), {STATE_FILE: write_synced(directory / STATE_FILE, content)})
    claim_run_dir(made)
    return store.publish(4)


def begun(recipe: Recipe, digests: dict[str, str] = DIGESTS) -> Start | None:
    return open_run(recipe, digests)[1]


def refusal(recipe: Recipe, digests: dict[str, str] = DIGESTS) -> str:
    """Why a run is refused, before it leaves anything that was not there."""
    before = {path: path.read_bytes() for path in Path(recipe.run_dir).rglob("*") if path.is_file()}
    with pytest.raises(UserError) as raised:
        open_run(recipe, digests)
    assert before == {path: path.read_bytes() for path in Path(recipe.run_dir).rglob("*") if path.is_file()}
    return str(raised.value)


def test_what_each_combination_of_keys_means(recipe: MakeRecipe) -> None:
    other, path = save(recipe("other")), f"load_path={recipe('other').run_dir}"
    whole, weights = Start(other, own=False), Start(other, own=False, weights_only=True)
    assert begun(recipe("a", path)) == whole
    assert begun(recipe("b", path, "load_weights_only=true")) == weights
    assert begun(recipe("c", path, "autoresume=true")) == whole, "there is none of its own yet"
    assert begun(recipe("d", path, "load_weights_only=true", "autoresume=true")) == weights
    assert begun(recipe("e", "autoresume=true")) is None
    own = Start(save(recipe("d")))
    assert begun(recipe("d", path, "load_weights_only=true", "autoresume=true")) == own, "its own is continued whole"
    assert begun(recipe("d", path, "autoresume=true")) == own


def test_the_uploaded_checkpoints_of_a_run_are_its_own(recipe: MakeRecipe, tmp_path: Path) -> None:
    shutil.copytree(store_of(save(recipe("a")).parents[1]).root, tmp_path / "store")
    other = save(recipe("other"))
    keys = ("autoresume=true", f"save_remote=file://{tmp_path}/store", f"load_path={other}", "load_weights_only=true")
    start = begun(recipe("lost", *keys))
    assert start is not None
    assert (start.own, start.weights_only, start.checkpoint.name) == (True, False, "ba4")
    said = refusal(recipe("fork", *keys, "optimizer.lr=1e-5"))
    assert said.startswith(f"save_remote: file://{tmp_path}/store holds checkpoints of a run with another recipe; ")
    assert said.endswith("\n  optimizer.lr: 0.004 -> 1e-05")


def test_an_import_has_weights_alone(recipe: MakeRecipe) -> None:
    weights = {key: value for key, value in flatten(recipe("x")).items() if key.startswith("model.")}
    imported = save(recipe("imported"), **{WEIGHTS_ONLY: True, "recipe": weights, "data_digests": None})
    for keys in ([], ["load_weights_only=true"]):
        start = begun(recipe(f"run{len(keys)}", f"load_path={imported}", *keys, "global_train_batch_size=8"))
        assert start == Start(imported, own=False, weights_only=True)


@pytest.mark.parametrize("key", ["train_loader.dataset", "tokenizer"])
def test_other_data_are_refused_where_a_run_goes_on_and_free_in_a_new_phase(recipe: MakeRecipe, key: str) -> None:
    checkpoint = save(recipe("a"))
    other = DIGESTS | {key: "d" * 64}
    said = refusal(recipe("b", f"load_path={checkpoint}"), other)
    place = {"train_loader.dataset": "data/quickstart/train", "tokenizer": "data/quickstart/tokenizer"}[key]
    assert said.startswith(f"{key}: {place} is not what {checkpoint} was saved with (digest dddddddddddd here, ")
    assert said.endswith(f"begin a new phase with the weights: load_path={checkpoint} load_weights_only=true")
    assert not (Path(recipe("b").run_dir) / "config.yaml").exists()
    said = refusal(recipe("a", "autoresume=true"), other)
    assert f"with the weights in another run_dir: load_path={checkpoint} load_weights_only=true" in said
    phase = begun(recipe("b", f"load_path={checkpoint}", "load_weights_only=true"), other)
    assert phase == Start(checkpoint, own=False, weights_only=True)


def test_another_reference_is_refused_where_a_run_goes_on(recipe: MakeRecipe) -> None:
    key = "train_loader.dataset (reference)"
    checkpoint = save(recipe("a"), data_digests=DIGESTS | {key: "e" * 16})
    assert begun(recipe("a", "autoresume=true"), DIGESTS | {key: "e" * 16}) == Start(checkpoint)
    for made in (recipe("a", "autoresume=true"), recipe("b", f"load_path={checkpoint}")):
        said = refusal(made, DIGESTS | {key: "f" * 16})
        assert said.startswith(f"{key}: data/quickstart/train has log-probabilities of another model than {checkpoint}")
    assert begun(recipe("b", f"load_path={checkpoint}", "load_weights_only=true"), DIGESTS | {key: "f" * 16})
    earlier = save(recipe("c"))
    assert begun(recipe("c", "autoresume=true"), DIGESTS | {key: "f" * 16}) == Start(earlier), "it says nothing of one"


def test_another_end_of_text_token_counts_where_the_tokenizer_decides_it(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Of remote data; a local corpus says by itself which token ends its documents. Other settings are free."""
    remote = "train_loader.dataset={local: cache, remote: 's3://bucket/data', split: train}"
    keys = [f"tokenizer.name={tmp_path}/tokenizer", "model.document_masking=true", "eval_loader=null"]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")

    def digests(settings: dict[str, Any], *changes: str) -> dict[str, str]:
        (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
        return known_digests(recipe("a", *keys, *changes))

    one, two = {"eos_token": "<end>"}, {"eos_token": {"content": "<stop>"}}
    assert digests(one) == digests(two), "local data"
    assert digests(one, remote) == digests(one | {"chat_template": "x"}, remote)
    before, here = digests(one, remote), digests(two, remote)
    key = "tokenizer (eos_token)"
    assert {name for name in here if here[name] != before[name]} == {key}
    checkpoint = save(recipe("a", *keys, remote), data_digests=before)
    said = refusal(recipe("a", *keys, remote, "autoresume=true"), here)
    assert said.startswith(f"{key}: {tmp_path}/tokenizer is not what {checkpoint} was saved with")
    del before[key]
    assert begun(recipe("b", *keys, remote, "autoresume=true")) is None
    save(recipe("b", *keys, remote), data_digests=before)
    assert begun(recipe("b", *keys, remote, "autoresume=true"), here) is not None, "of an earlier version"


def test_other_held_out_data_are_refused_in_the_same_run_alone(recipe: MakeRecipe, capsys: Any) -> None:
    checkpoint = save(recipe("a"))
    other = DIGESTS | {"eval_loader.dataset": "d" * 64}
    assert refusal(recipe("a", "autoresume=true"), other).startswith("eval_loader.dataset: data/quickstart/val is not")
    assert begun(recipe("b", f"load_path={checkpoint}"), other) == Start(checkpoint, own=False)
    assert "note: eval_loader.dataset: data/quickstart/val is not what" in capsys.readouterr().err
    none = {key: value for key, value in DIGESTS.items() if key == "train_loader.dataset"}
    assert begun(recipe("a", "autoresume=true"), none) == Start(checkpoint), "what is not there cannot differ"


def test_places_are_free(recipe: MakeRecipe, tmp_path: Path) -> None:
    """A run_dir that was copied, moved, or is named in another way; data that are served from elsewhere."""
    checkpoint = save(recipe("a"))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    places = [
        "train_loader.dataset={local: cache, remote: 's3://bucket/data', split: training}",
        "eval_loader.dataset.local=cache",
        "eval_loader.dataset.split=held-out",
        "tokenizer.name=elsewhere",
        "autoresume=true",
    ]
    assert begun(recipe("copy", *places)) == Start(tmp_path / "copy" / "checkpoints" / "ba4")
    same = load_recipe(QUICKSTART, [f"run_dir={tmp_path}/copy/../a", "run_name=a", *places])
    start = begun(same)
    assert start is not None
    assert start.checkpoint.resolve() == checkpoint
    assert "seed: 17 -> 3" in refusal(recipe("a", "autoresume=true", "seed=3")), "other keys are not"


def test_with_nothing_left_to_train(recipe: MakeRecipe) -> None:
    """The run itself has ended well, whoever starts it again; another has nothing to do."""
    path = f"load_path={save(recipe('a', 'max_duration=4ba'))}"
    for name, duration in (("b", "4ba"), ("c", "3ba"), ("d", "16sp"), ("e", "8192tok")):
        said = refusal(recipe(name, path, f"max_duration={duration}"))
        assert f"of max_duration={duration}: nothing is left to train; raise max_duration" in said
        assert "load_weights_only=true" in said
    for name, duration in (("f", "5ba"), ("g", "17sp"), ("h", "8193tok"), ("i", "1ep")):
        assert begun(recipe(name, path, f"max_duration={duration}")) is not None
    assert begun(recipe("j", path, "max_duration=4ba", "load_weights_only=true")) is not None
    assert begun(recipe("a", "max_duration=4ba", "autoresume=true")) is not None


@pytest.mark.parametrize("change", ["train_loader.dataset.shuffle=false", "train_loader.drop_last=false"])
def test_another_order_of_the_data_is_refused(recipe: MakeRecipe, change: str) -> None:
    checkpoint = save(recipe("a"))
    key = change.partition("=")[0]
    said = refusal(recipe("b", f"load_path={checkpoint}", change))
    assert said.startswith(f"{key}: false, and {checkpoint} was written with true; ")
    assert begun(recipe("b", f"load_path={checkpoint}", change, "load_weights_only=true")) is not None


def test_what_goes_on_unlike_the_recipe_is_said(recipe: MakeRecipe, capsys: Any) -> None:
    checkpoint = save(recipe("a"))
    assert begun(recipe("b", f"load_path={checkpoint}", "seed=5")) is not None
    line = f"note: train_loader.dataset.shuffle_seed: 5; the data go on in the order of {checkpoint}, that of 17\n"
    assert capsys.readouterr().err == line
    assert begun(recipe("c", f"load_path={checkpoint}", "seed=5", "load_weights_only=true")) is not None
    assert capsys.readouterr().err == ""


def test_what_changes_the_learning_rate_is_named(recipe: MakeRecipe) -> None:
    checkpoint = save(recipe("a"))

    def changes(*keys: str) -> str:
        start = check_start(checkpoint, False, recipe("b", *keys), DIGESTS)
        return start.schedule_changes

    assert changes() == changes("optimizer.weight_decay=0.2", "eval_interval=7ba") == ""
    before = "; the batch before had 0.004"
    assert changes("max_duration=400ba") == f"max_duration is '400ba', and was '200ba'{before}"
    assert changes("optimizer.lr=1e-5") == f"optimizer.lr is 1e-05, and was 0.004{before}"
    timing = f"scheduler.timing is 'composer', and was 'batch_end'{before}"
    assert changes("scheduler.timing=composer") == timing
    assert "scheduler.alpha_f is null, and was 0.1" in changes("scheduler={name: constant_with_warmup}")


def test_checkpoints_of_earlier_releases(recipe: MakeRecipe, tmp_path: Path, capsys: Any) -> None:
    """They have no digests and no ``scheduler.timing``, which was Composer's; their place and position is all that is
    known of their data."""
    index = {"version": 2, "shards": [{"samples": 10}, {"samples": 5}]}
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "index.json").write_text(json.dumps(index))
    new = ("format_version", "scheduler.timing", "load_weights_only")
    stored = {key: value for key, value in flatten(recipe("a")).items() if key not in new}
    old = {"recipe": stored, "data_digests": None, "lr": None, "schedulers": [{"_last_lr": [0.001]}]}
    data = f"train_loader.dataset.local={tmp_path}/data"

    fits = save(recipe("a"), **old, data={"sample_in_epoch": 12})
    start = begun(recipe("b", f"load_path={fits}", data))
    assert start == Start(fits, own=False, schedule_changes="scheduler.timing is 'batch_end', and was 'composer'")
    line = (
        f"note: {fits} has no digest of its data, data/quickstart/train; {tmp_path}/data/train is taken for the same\n"
    )
    assert capsys.readouterr().err == line

    beyond = save(recipe("c"), **old, data={"sample_in_epoch": 16})
    said = refusal(recipe("d", f"load_path={beyond}", data))
    assert f"train_loader.dataset: {beyond} is at sample 16 of its epoch, and {tmp_path}/data/train has 15" in said


def test_a_stored_recipe_need_not_pass_the_checks_of_this_release(recipe: MakeRecipe) -> None:
    checkpoint = save(recipe("a"))
    config = checkpoint.parents[1] / "config.yaml"
    config.write_text(config.read_text().replace("checkpoints_to_keep: 2", "checkpoints_to_keep: 0"))
    assert begun(recipe("a", "autoresume=true")) == Start(checkpoint)


def test_digests_are_of_content(tiny_recipe: MakeRecipe, tiny_corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_corpus, tmp_path / "a b#ü")
    cache = tmp_path / "cache"
    for split in ("train", "val"):
        (cache / split).mkdir(parents=True)
        shutil.copy(tiny_corpus / split / "index.json", cache / split)
    here = data_digests(tiny_recipe(tmp_path / "run"))
    assert here.keys() == DIGESTS.keys()
    assert data_digests(tiny_recipe(tmp_path / "run", f"train_loader.dataset.local={copy}")) == here
    remote = (f"train_loader.dataset.local={cache}", f"train_loader.dataset.remote={tiny_corpus}")
    served = data_digests(tiny_recipe(tmp_path / "run", *remote))
    assert served == {key: value for key, value in here.items() if key != "tokenizer"}, "of what has been downloaded"
    assert data_digests(tiny_recipe(tmp_path / "run", "eval_loader=null")).keys() == DIGESTS.keys() - {
        "eval_loader.dataset"
    }
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    changed = data_digests(tiny_recipe(tmp_path / "run", f"train_loader.dataset.local={copy}"))
    assert [key for key in here if changed[key] != here[key]] == ["tokenizer"]


def test_a_checkpoint_of_a_later_release_is_refused(recipe: MakeRecipe) -> None:
    later = save(recipe("a"), recipe=flatten(recipe("a")) | {"format_version": 99})
    message = (
        f"{later}/state.json: checkpoint of a later release: recipe of format_version 99; "
        f"this release reads 1 to {FORMAT_VERSION}"
    )
    assert refusal(recipe("b", f"load_path={later}")) == message


def test_a_width_that_no_block_has_makes_no_other_architecture(recipe: MakeRecipe) -> None:
    """Recipes of the first version say one in any case."""
    sparse = ("model.n_dense_layers=0", "model.ffn_hidden_size=null")
    stored = flatten(recipe("a", *sparse)) | {"model.ffn_hidden_size": 1024}
    path = save(recipe("a", *sparse), recipe=stored)
    assert begun(recipe("b", *sparse, f"load_path={path}")) == Start(path, own=False)
