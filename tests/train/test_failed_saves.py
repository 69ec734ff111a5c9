"""A save that fails in the middle of a run: every rank ends with one line that says what failed, and what was saved
before is gone on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import Recipe
from tests.checkpoint.forge import verify_directory
from tests.distributed import captured_output, run_distributed
from tests.train.runs import finished, run_recipe

Overrides = Callable[..., list[str]]
STEPS = ("max_duration=6ba", "save_interval=2ba", "eval_loader=null")


def train_on_a_full_disk(arguments: list[str], file: str | None) -> tuple[int, str]:
    """The command line's status and standard error of a rank. The disk is full when ``file`` is written; without one,
    the store of uploads is gone after the start."""
    from moefoundry.checkpoint import save
    from moefoundry.cli.main import main
    from moefoundry.data import stores

    write_file = save.write_file

    def write(path: Path, *values: object) -> object:
        if str(path).endswith(file or "nothing"):
            path.symlink_to("/dev/full")
        return write_file(path, *values)  # type: ignore[arg-type]

    save.write_file = write  # type: ignore[assignment]

    def upload(store: object, path: Path, name: str) -> None:
        if name != stores.PROBE:
            raise ConnectionResetError("reset")

    stores._FsspecStore.upload, stores._FsspecStore.remove = upload, lambda store, name: None  # type: ignore[assignment]
    stores.FIRST_WAIT = 0.0
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, texts[1]


@pytest.mark.parametrize(
    "in_background", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in the background", "waiting"]
)
@pytest.mark.slow
def test_row26_a_full_disk_ends_the_run_and_the_last_checkpoint_is_gone_on_from(
    tiny_overrides: Overrides, tiny_recipe: Callable[..., Recipe], tmp_path: Path, in_background: bool
) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny_overrides(run_dir, *STEPS, f"save_async={str(in_background).lower()}")
    outcomes = run_distributed(train_on_a_full_disk, 2, arguments, "ba4.incomplete/__1_0.distcp")
    what = "checkpoint ba4 was not saved" + ("" if in_background else ": cannot write")
    failure = f"{what}: {run_dir}/checkpoints/ba4.incomplete/__1_0.distcp: No space left on device\n"
    assert [status for status, _ in outcomes] == [2, 2]
    assert f"error: {failure}" in outcomes[0][1]
    assert (f"warning: {failure}" in outcomes[1][1]) == in_background, "it is told at once"
    assert finished(run_dir).checkpoints() == ["ba2"]
    verify_directory(run_dir / "checkpoints" / "ba2")
    if in_background:
        resumed = run_recipe(tiny_recipe(run_dir, *STEPS, "autoresume=true"), 2)
        assert resumed.exact() == run_recipe(tiny_recipe(tmp_path / "whole", *STEPS), 2).exact()


def test_row20_a_failed_upload_is_no_failed_save(tiny_overrides: Overrides, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/uploads"
    arguments = tiny_overrides(tmp_path / "run", *STEPS, f"save_remote={url}")
    ((status, err),) = run_distributed(train_on_a_full_disk, 1, arguments, None)
    failure = f"checkpoint ba2 was saved, but not uploaded: {url}/ba2/COMMITTED: cannot upload (attempts: 6): reset"
    assert status == 2
    assert f"warning: {failure}" in err
    assert f"error: {failure}" in err
    assert "not saved" not in err
    assert finished(tmp_path / "run").checkpoints() == ["ba2"]
