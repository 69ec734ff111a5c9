"""`moefoundry explain`: one key, by any of its names."""

from __future__ import annotations

import pytest

from moefoundry.cli.main import main
from moefoundry.config.explain import explain
from moefoundry.config.spec import elsewhere, every_key
from tests.conftest import QUICKSTART


def test_every_key_and_every_name_elsewhere_is_explained() -> None:
    for path, spec in every_key().items():
        text = explain(path)
        assert text.startswith(f"{path}: ")
        assert spec.doc in text
    for name in elsewhere():
        assert name in explain(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("top_k", "model.moe.top_k: integer, required"),
        ("num_experts_per_tok", "a name of other projects for model.moe.top_k"),
        ("packing_ratio", "train_loader.dataset.packing.method=best_fit"),
        ("model.moe.router", "    score_function: "),
        ("train_loader.dataset.streams", "    NAME.proportion: Share of an epoch's rows"),
        ("optimizer.weight_decay", "default "),
        ("optimizer.momentum", "optimizer.momentum: number, default 0.95"),
        ("muon_momentum", "a name of other projects for optimizer.momentum"),
        ("seed", "on resume: another value is another run"),
    ],
)
def test_a_name_leads_to_its_key(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == 0
    assert expected in capsys.readouterr().out


def test_the_value_in_a_recipe_and_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "top_k", str(QUICKSTART), "model.moe.top_k=4"]) == 0
    assert "model.moe.top_k: 4  (override)" in capsys.readouterr().out


def test_an_unknown_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "model.moe.topk"]) == 2
    assert "error: model.moe.topk: no key of a recipe; did you mean model.moe.top_k" in capsys.readouterr().err
