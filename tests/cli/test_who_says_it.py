"""Which rank of a launch prints an error."""

from pathlib import Path

import pytest

from moefoundry.cli.train import _is_to_say
from moefoundry.config import ConfigError, DataError, UserError, load_recipe


def error_of(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value


@pytest.mark.parametrize(("rank", "local_rank", "all_alike", "of_a_node"), [(0, 0, 1, 1), (1, 1, 0, 0), (8, 0, 0, 1)])
def test_a_file_that_one_node_lacks_is_said_there(tmp_path, monkeypatch, rank, local_rank, all_alike, of_a_node):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    (tmp_path / "child.yaml").write_text("extends: base.yaml\n")
    files = [error_of(tmp_path / "none.yaml"), error_of(tmp_path / "child.yaml"), error_of(tmp_path)]
    assert [_is_to_say(error) for error in files] == [bool(of_a_node)] * 3
    (tmp_path / "base.yaml").write_text("seed: x\n")
    assert _is_to_say(error_of(tmp_path / "child.yaml")) == bool(all_alike)
    assert _is_to_say(UserError("no room")) == bool(of_a_node)
    assert _is_to_say(DataError("damaged"))
