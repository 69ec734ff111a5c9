"""A run directory belongs to one recipe."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from moefoundry.checkpoint.manifest import (
    COMMIT_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    STATE_KEYS,
    HashRange,
    Origin,
    commit,
    write_synced,
)
from moefoundry.checkpoint.remote import upload_checkpoint
from moefoundry.checkpoint.run_dir import (
    CONFIG_FILE,
    check_run_dir,
    check_run_name,
    claim_run_dir,
    newest_intact,
    open_run,
    store_of,
)
from moefoundry.checkpoint.start import Start, check_start
from moefoundry.config import Recipe, UserError, flatten, load_recipe
from tests.conftest import QUICKSTART

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> MakeRecipe:
    return lambda *changes: load_recipe(QUICKSTART, [f"run_dir={tmp_path / 'a' / 'run'}", *changes])


def begin(recipe: Recipe) -> Path:
    run_dir = check_run_dir(recipe)
    claim_run_dir(recipe)
    return run_dir


def save_checkpoint(recipe: Recipe, batch: int = 4, stored: dict[str, Any] | None = None) -> Path:
    """A checkpoint without tensors; ``stored`` is the flat recipe in it, where it is not ``recipe``'s."""
    store = store_of(Path(recipe.run_dir))
    directory = store.begin(batch)
    state = dict.fromkeys(STATE_KEYS) | {"recipe": flatten(recipe) if stored is None else stored}
    ranges = write_synced(directory / STATE_FILE, json.dumps(state).encode())
    commit(directory, Origin(batch), {STATE_FILE: ranges})
    return store.publish(batch)


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


@pytest.mark.parametrize(
    ("place", "saved", "remedy"),
    [
        ("named", False, r"choose another run_name, or remove .*, which has no checkpoints\. Diff"),
        ("named", True, r"choose another run_name\. Diff"),
        ("spelled_out", True, r"choose another run_dir\. Diff"),
    ],
)
def test_another_recipe_is_told_where_to_go(tmp_path: Path, place: str, saved: bool, remedy: str) -> None:
    keys = [f"run_dir={tmp_path}/{place}", "run_name=named"]
    recipe = load_recipe(QUICKSTART, keys)
    begin(recipe)
    if saved:
        save_checkpoint(recipe)
    with pytest.raises(UserError, match=remedy):
        check_run_dir(load_recipe(QUICKSTART, [*keys, "seed=3"]))


@pytest.mark.parametrize(
    ("place", "changes", "refused"),
    [
        ("orig", ["run_name=fork"], True),
        ("orig/out", ["run_name=fork"], True),
        ("orig", [], False),
        ("elsewhere", ["run_name=fork"], False),
        ("${run_name}", ["run_name=fork"], False),
    ],
)
def test_a_directory_called_after_another_run_is_refused(
    tmp_path: Path, place: str, changes: list[str], refused: bool
) -> None:
    keys = [f"run_dir={tmp_path}/{place}", "run_name=orig"]
    begin(load_recipe(QUICKSTART, keys))
    recipe = load_recipe(QUICKSTART, [*keys, *changes])
    if not refused:
        check_run_name(recipe)
        return
    fork = f"{tmp_path}/{place}".replace("orig", "fork")
    with pytest.raises(UserError, match=rf"^run_name: fork, and .* is the run orig; .*: run_dir={fork}; or say"):
        check_run_name(recipe)


def test_checkpoints_are_continued_or_left_alone(recipe: MakeRecipe) -> None:
    run_dir = begin(recipe())
    save_checkpoint(recipe())
    advice = r"continue it with autoresume=true or choose another run_dir$"
    with pytest.raises(UserError, match=rf"holds checkpoints of this recipe; {advice}"):
        check_run_dir(recipe())
    assert begin(recipe("autoresume=true", "max_duration=400ba")) == run_dir
    assert "max_duration: 400ba" in (run_dir / CONFIG_FILE).read_text()


def test_keys_that_a_recipe_of_the_first_version_does_not_have_mean_what_they_meant(recipe: MakeRecipe) -> None:
    later = ("model.dense_layers", "model.moe.router.input_jitter", "model.attention.bias", "model.attention.head_dim")
    stored = {key: value for key, value in flatten(recipe()).items() if key not in (*later, "format_version")}
    newest = save_checkpoint(recipe(), stored=stored)
    assert open_run(recipe("autoresume=true"), {}) == (newest.parents[1], Start(newest))
    with pytest.raises(UserError) as raised:
        check_start(newest, True, recipe("model.dense_layers=[2]", "model.attention.bias=all"), {})
    assert str(raised.value).splitlines()[1:] == [
        "  model.dense_layers: [] there, [2] here",
        "  model.attention.bias: 'none' there, 'all' here",
    ]


def test_keys_that_are_only_in_the_stored_recipe_count_too(recipe: MakeRecipe) -> None:
    newest = save_checkpoint(recipe("model.attention.yarn={factor: 8, original_max_seq_len: 64}"))
    with pytest.raises(UserError, match=r"\n  model\.attention\.yarn\.factor: 8\.0 there, null here\n"):
        check_start(newest, True, recipe(), {})


def test_where_every_checkpoint_is_damaged_each_is_named_once_with_what_to_do(recipe: MakeRecipe) -> None:
    run_dir = begin(recipe())
    for batch, file in ((2, COMMIT_FILE), (4, STATE_FILE), (6, MANIFEST_FILE)):
        (save_checkpoint(recipe(), batch) / file).write_text("{}")
    with pytest.raises(UserError) as raised:
        open_run(recipe("autoresume=true"), {})
    first, *lines, last = str(raised.value).splitlines()
    assert first == f"autoresume: every checkpoint in {run_dir}/checkpoints is damaged:"
    assert [line.split(": ")[0] for line in lines] == [
        f"  ba6/{MANIFEST_FILE}",
        f"  ba4/{STATE_FILE}",
        f"  ba2/{MANIFEST_FILE}",
    ]
    assert f"or move {run_dir}/checkpoints away: the run then goes on from save_remote" in last
    (run_dir / "checkpoints").rename(run_dir / "damaged")
    assert open_run(recipe("autoresume=true"), {}) == (run_dir, None), "as the message says"


def test_a_checkpoint_with_several_damaged_files_is_one_line(recipe: MakeRecipe) -> None:
    store = store_of(begin(recipe()))
    directory = store.begin(4)
    commit(directory, Origin(4), {name: [HashRange(0, 1, "00")] for name in ("a.distcp", "b.distcp", STATE_FILE)})
    store.publish(4)
    with pytest.raises(UserError) as raised:
        newest_intact(store, sizes_only=True)
    (line,) = str(raised.value).splitlines()[1:-1]
    assert (
        line == "  ba4/a.distcp: unreadable: No such file or directory (and 2 more; see moefoundry checkpoint verify)"
    )


def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"run_dir: cannot create {tmp_path}/file/run: Not a directory"):
        check_run_dir(load_recipe(QUICKSTART, [f"run_dir={tmp_path}/file/run"]))


def test_a_directory_that_cannot_be_written_is_named(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"run_dir: .*/a/run is not a directory that can be written to"):
        check_run_dir(recipe())


@pytest.mark.parametrize("name", ["", "checkpoints"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_should_be_a_directory_and_is_not_is_named(recipe: MakeRecipe, name: str, kind: str) -> None:
    path = Path(recipe().run_dir) / name
    path.parent.mkdir(parents=True)
    path.write_text("") if kind == "file" else path.symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"^run_dir: {path} is not a directory that can be written to$"):
        check_run_dir(recipe())


def test_a_recipe_that_cannot_be_written_leaves_the_old_one(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = check_run_dir(recipe()) / CONFIG_FILE
    claim_run_dir(recipe())
    written = path.read_text()

    def full(file: Path, content: bytes) -> None:
        file.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moefoundry.checkpoint.run_dir.write_synced", full)
    with pytest.raises(UserError, match=rf"run_dir: cannot write {path}: No space left"):
        claim_run_dir(recipe())
    assert path.read_text() == written


@pytest.fixture
def shared(recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """A run that has batch 4 here, and whose store has batches 2, 4 and 6, from a machine that went on."""
    shared = recipe(f"save_remote=memory://{tmp_path.name}/run", "autoresume=true")
    for batch in (2, 4, 6):
        there = save_checkpoint(replace(shared, run_dir=str(tmp_path / "there")), batch)
        upload_checkpoint(there, shared.save_remote or "")
    save_checkpoint(shared, 4)
    return shared


def started_from(recipe: Recipe) -> str:
    """Parent and name of the checkpoint that a run of its own goes on from."""
    _, start = open_run(recipe, {})
    assert start is not None
    assert start.own
    return "/".join(start.checkpoint.parts[-2:])


def test_the_newer_of_a_checkpoint_here_and_an_uploaded_one_is_taken(
    shared: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started_from(shared) == "downloads/ba6"
    store = store_of(Path(shared.run_dir))
    assert capsys.readouterr().err == (
        f"note: save_remote, {shared.save_remote}, has ba6, newer than {store.path(4)}: the run goes on from it; "
        "to go on from ba4 instead, name another save_remote, or move the newer ones there away\n"
    )
    for batch in (6, 8):  # the same batch is in both, and then a later one is here
        save_checkpoint(shared, batch)
        assert started_from(shared) == f"checkpoints/ba{batch}"
    assert capsys.readouterr().err == ""


def test_where_the_newer_upload_cannot_be_taken_the_checkpoint_here_is(
    shared: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = store_of(Path(shared.run_dir)).path(4)
    unknown = f"warning: save_remote: whether it has a newer checkpoint than {here} is not known: "
    files, root = fsspec.core.url_to_fs(shared.save_remote)
    files.rm(f"{root}/ba6/{STATE_FILE}")
    assert started_from(shared) == "checkpoints/ba4"
    assert f"{shared.save_remote}/ba6/{STATE_FILE}: not there\n" in (said := capsys.readouterr().err)
    assert unknown in said

    def forbidden(*args: object) -> None:
        raise PermissionError("forbidden")

    monkeypatch.setattr("moefoundry.data.stores._FsspecStore.names", forbidden)
    assert started_from(shared) == "checkpoints/ba4"
    said = capsys.readouterr().err
    assert said == f"{unknown}{shared.save_remote}: cannot list (attempts: 1): forbidden\n"


def test_a_newer_upload_of_another_run_is_refused(shared: Recipe, tmp_path: Path) -> None:
    another = load_recipe(QUICKSTART, [f"run_dir={tmp_path / 'another'}", "seed=3"])
    upload_checkpoint(save_checkpoint(another, 8), shared.save_remote or "")
    with pytest.raises(UserError, match=r"holds checkpoints of a run with another recipe; choose another URL\. .*"):
        open_run(shared, {})
