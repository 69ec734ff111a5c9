"""Composer's private parts are reached in one file, which says so where the version is not the one tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moefoundry

SOURCE = Path(moefoundry.__file__).parent
PRIVATE = re.compile(
    r"\b(trainer|state|logger|engine|device)\._[a-z]|collect_env|from composer\.\S*\._|composer\.trainer\."
)
STREAMING = re.compile(r"from streaming\.base\.\S+ import .*\b_|streaming\.base\.shared|get_shm_prefix")


def apply_with(version: str, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import composer
    from composer.core import Engine
    from composer.utils import collect_env

    from moefoundry import composer_patches

    monkeypatch.setattr(composer, "__version__", version)
    monkeypatch.setattr(composer_patches, "OVERRIDDEN", (*composer_patches.OVERRIDDEN, *([lacking] if lacking else [])))
    for name in ("get_cpu_model", "get_composer_commit_hash"):
        monkeypatch.setattr(collect_env, name, getattr(collect_env, name))
    monkeypatch.setattr(Engine, "_debug_log", Engine._debug_log)
    composer_patches.apply()


def test_the_tested_version_is_used_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from composer.core import Engine
    from composer.utils import collect_env

    from moefoundry.composer_patches import TESTED

    apply_with(TESTED, "", monkeypatch)
    assert capsys.readouterr().err == ""
    assert collect_env.get_cpu_model() == "unknown"
    assert Engine._debug_log(None, None, "") is None, "it looks at nothing"  # type: ignore[arg-type,func-returns-value]


def test_the_commit_is_that_of_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.composer_patches import commit_of_composer

    monkeypatch.syspath_prepend(tmp_path)
    installed = tmp_path / "mosaicml-99.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: mosaicml\nVersion: 99\n")
    assert commit_of_composer() is None
    (installed / "direct_url.json").write_text('{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}')
    assert commit_of_composer() == "abc"


def test_another_version_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    apply_with("0.33.0", "", monkeypatch)
    message = "warning: Composer 0.33.0 is installed, and moefoundry is tested with mosaicml==0.32.1\n"
    assert capsys.readouterr().err == message


def test_a_version_without_what_is_overridden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.config import UserError

    with pytest.raises(UserError, match=r"^Composer 0\.33\.0 .*==0\.32\.1: it has no Trainer\._shard; install that"):
        apply_with("0.33.0", "_shard", monkeypatch)


def test_nothing_else_reaches_into_private_parts() -> None:
    reaching = {"composer_patches.py": PRIVATE, "data/guard.py": STREAMING}
    for allowed, pattern in reaching.items():
        found = [
            str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py")) if pattern.search(path.read_text())
        ]
        assert found == [allowed]


def test_the_pins_are_what_is_tested() -> None:
    from moefoundry.composer_patches import TESTED
    from moefoundry.data import guard

    lock = (SOURCE.parents[1] / "requirements.lock").read_text()
    assert f"\nmosaicml=={TESTED}" in lock
    assert f"\nmosaicml-streaming=={guard.TESTED}" in lock


def test_another_version_of_streaming_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import streaming

    from moefoundry.data import guard

    monkeypatch.setattr(streaming, "__version__", "0.14.0")
    with pytest.warns(UserWarning, match=r"mosaicml-streaming 0\.14\.0 is installed, .*==0\.13\.0"):
        guard.check_version()


def test_no_graph_is_left_behind_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from composer import Trainer

    from moefoundry.composer_patches import MeshTrainer

    class State:
        model = torch.nn.Linear(2, 1)
        outputs: object = None
        loss: object = None

    def train(trainer: Trainer, *_: object) -> dict[str, torch.Tensor]:
        out = trainer.state.model(torch.ones(3, 2))
        trainer.state.outputs, trainer.state.loss = (out, {"kept": 1.0}), {"total": out.sum()}
        return {"total": out.detach().sum()}

    monkeypatch.setattr(Trainer, "_train_microbatch", train)
    trainer = MeshTrainer.__new__(MeshTrainer)
    trainer.state = State()  # type: ignore[assignment]
    losses = trainer._train_microbatch(False, 3, True)
    (out, others), loss = trainer.state.outputs, trainer.state.loss
    assert others == {"kept": 1.0}
    assert torch.equal(losses["total"], loss["total"])
    assert torch.equal(out.sum(), loss["total"])
    assert not out.requires_grad
    assert not loss["total"].requires_grad
