"""A run directory belongs to one recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.checkpoint.manifest import Origin, commit
from moefoundry.checkpoint.run_dir import CONFIG_FILE, FREE_KEYS, check_run_dir, claim_run_dir, store_of
from moefoundry.config import Recipe, UserError, flatten, load_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> MakeRecipe:
    return lambda *changes: load_recipe(None, [f"run_dir={tmp_path / 'a' / 'run'}", *changes])


def begin(recipe: Recipe) -> Path:
    run_dir = check_run_dir(recipe)
    claim_run_dir(recipe)
    return run_dir


def save_checkpoint(recipe: Recipe) -> None:
    store = store_of(Path(recipe.run_dir))
    commit(store.begin(4), Origin(4), {})
    store.publish(4)


def test_the_resolved_recipe_is_written_and_loads(recipe: MakeRecipe) -> None:
    run_dir = begin(recipe("seed=3"))
    assert load_recipe(run_dir / CONFIG_FILE) == recipe("seed=3")


def test_a_run_without_checkpoints_may_start_again(recipe: MakeRecipe) -> None:
    assert begin(recipe()) == begin(recipe())


def test_another_recipe_is_refused_with_the_keys_that_differ(recipe: MakeRecipe) -> None:
    config = begin(recipe()) / CONFIG_FILE
    before = config.read_text()
    with pytest.raises(UserError) as raised:
        check_run_dir(recipe("seed=3", "model.moe.top_k=4", "autoresume=true", "max_duration=300ba"))
    message = str(raised.value)
    assert "belongs to a run with another recipe" in message
    assert "\n  seed: 17 -> 3" in message
    assert "\n  model.moe.top_k: 2 -> 4" in message
    assert "max_duration" not in message
    assert config.read_text() == before


def test_checkpoints_are_continued_or_left_alone(recipe: MakeRecipe) -> None:
    run_dir = begin(recipe())
    save_checkpoint(recipe())
    with pytest.raises(UserError, match=r"holds checkpoints of this recipe; continue it with autoresume=true"):
        check_run_dir(recipe())
    assert begin(recipe("autoresume=true", "max_duration=400ba")) == run_dir
    assert "max_duration: 400ba" in (run_dir / CONFIG_FILE).read_text()


def test_free_keys_exist(recipe: MakeRecipe) -> None:
    keys = flatten(recipe())
    for free in FREE_KEYS:
        assert any(key.startswith(free) for key in keys), free


def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"run_dir: cannot create {tmp_path}/file/run: Not a directory"):
        check_run_dir(load_recipe(None, [f"run_dir={tmp_path}/file/run"]))


def test_a_directory_that_cannot_be_written_is_named(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"run_dir: .*/a/run is not writable"):
        check_run_dir(recipe())


def test_a_damaged_config_is_named(recipe: MakeRecipe) -> None:
    run_dir = begin(recipe())
    (run_dir / CONFIG_FILE).write_text("seed: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        check_run_dir(recipe())


def test_a_directory_is_not_claimed_by_looking(recipe: MakeRecipe) -> None:
    check_run_dir(recipe("seed=3"))
    check_run_dir(recipe("seed=4"))
