"""One rule for what lies behind a path or a URL, and secrets that addresses have."""

from __future__ import annotations

from pathlib import Path

import pytest

from moefoundry.config import ConfigError, UserError, load_recipe
from moefoundry.config.advice import fitting_overrides
from moefoundry.config.secrets import redact
from moefoundry.config.urls import is_url, path_problem, resolved, url_problem
from tests.conftest import QUICK


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("a/b c", "a/b c"),
        ("file:///a/b", "/a/b"),
        ("file:///a%20b/%C3%BC%23?x", "/a b/ü#?x"),
        ("file://localhost/a", "/a"),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
    ],
)
def test_a_file_url_is_a_path(place: str, path: str) -> None:
    assert resolved(place) == path
    assert url_problem(place) == ""


def test_a_path_and_its_url_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "odd%20ü#1?x"
    assert resolved(odd.as_uri()) == str(odd)
    assert resolved("~/data") == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("", "is empty"),
        ("s3:/bucket/run", "a URL has two slashes: s3://bucket/run"),
        ("s4://bucket", "no store has URLs that begin with s4://; did you mean s3://?"),
        ("s3://", "names no bucket or host after s3://"),
        ("s3://bucket/a b", "a URL has no blanks"),
        ("file://data/corpus", "a file:// URL has three slashes and a whole path: file:///data/corpus"),
        ("file://data", "three slashes"),
    ],
)
def test_what_is_no_place_is_refused(place: str, problem: str) -> None:
    assert problem in url_problem(place)


def test_a_store_that_is_not_like_what_was_written_is_not_proposed() -> None:
    assert url_problem("foo://bucket") == "no store has URLs that begin with foo://"


def test_what_is_a_path_alone() -> None:
    assert path_problem("runs/odd%20ü#1?x") == ""
    assert path_problem("file:///a%20b") == "a path is written without file://: /a b"
    assert "must be a path" in path_problem("s3://bucket/run")
    assert is_url("s3://bucket")
    assert not is_url("s3:/bucket")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("save_remote=s3:/bucket", "save_remote: 's3:/bucket': a URL has two slashes"),
        ("load_path=file://a/b", "load_path: 'file://a/b': a file:// URL has three slashes"),
        ("train_loader.dataset.remote=s33://b/c", "did you mean s3://?"),
        ("eval_loader.dataset.remote=https://", "eval_loader.dataset.remote: 'https://': names no bucket"),
        (
            "run_dir=s3://bucket/run",
            "run_dir: 's3://bucket/run': must be a path, not a URL; checkpoints are",
        ),
        ("train_loader.dataset.local=gs://b/c", "train_loader.dataset.local: 'gs://b/c': must be a path"),
        ("loggers.tensorboard={log_dir: 's3://b/c'}", "loggers.tensorboard.log_dir: 's3://b/c': must be a path"),
    ],
)
def test_recipes_follow_the_rule(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(None, [*QUICK, override])
    assert message in str(error.value)


@pytest.mark.parametrize("remote", ["file:///data", "/data", "azure-dl://c/d", "https://host/data", "memory://data"])
def test_data_come_from_every_store_and_path(remote: str) -> None:
    assert load_recipe(None, [*QUICK, f"train_loader.dataset.remote={remote}", f"load_path=file://{Path.cwd()}"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://(secret)@host/x"),
        ("s3:/me:p@w@host/x", "s3:/(secret)@host/x"),
        ("s3://AK:sec/ret@bucket/run: no", "s3://(secret)@bucket/run: no"),
        ("redis://:pw@h", "redis://(secret)@h"),
        ("https://a:b@c and https://d:e@f", "https://(secret)@c and https://(secret)@f"),
        ("https://b/x?X-Amz-Signature=abc&y=1&sig=Q%2F", "https://b/x?(secret)&y=1&(secret)"),
        ("abfs://container@account/x", "abfs://container@account/x"),
        ("http://host:8080/path@v1", "http://host:8080/path@v1"),
        ("s3://bucket/key=3/token=5", "s3://bucket/key=3/token=5"),
    ],
)
def test_secrets_of_addresses(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert str(UserError(f"{text}: no such store")) == f"{shown}: no such store"


def test_log_records_warnings_and_tracebacks_have_no_secrets(capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    script = (
        "import logging, threading, warnings\n"
        "from moefoundry.cli.exits import hide_secrets\n"
        "hide_secrets()\n"
        "address = 'https://me:hidden@host/x'\n"
        "logging.getLogger('library').error('cannot read %s', address)\n"
        "try:\n    raise ValueError(address)\n"
        "except ValueError:\n    logging.getLogger('library').exception('failed')\n"
        "logging.getLogger('library').error('%d', 'no number')\n"
        "warnings.warn(f'slow: {address}')\n"
        "thread = threading.Thread(target=open, args=(address,))\nthread.start()\nthread.join()\n"
        "raise RuntimeError(f'bad: {address}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("https://(secret)@host/x") >= 5
    assert "hidden@" not in done.stderr.replace("address = ", "")
    assert "RuntimeError: bad: https://(secret)@host/x" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["mesh={replicate: 4, shard: 64, expert: 16}", "global_train_batch_size=256"], 8, ["1", "8", "8", "256"]),
        (["mesh={replicate: 1, shard: 256, expert: 16}", "global_train_batch_size=256"], 12, ["1", "12", "4", "264"]),
        (["mesh={replicate: 2, shard: -1, expert: 16}", "global_train_batch_size=32"], 8, ["1", "8", "8", "32"]),
        (["mesh={replicate: 1, shard: 2, expert: 2}", "global_train_batch_size=6"], 5, ["5", "1", "1", "10"]),
    ],
)
def test_degrees_that_fit_another_number_of_ranks(overrides: list[str], world_size: int, expected: list[str]) -> None:
    found = fitting_overrides(load_recipe(None, [*QUICK, *overrides]), world_size)
    with pytest.raises(ConfigError, match=f"a world size of {world_size} fits with: {' '.join(found)}"):
        load_recipe(None, [*QUICK, *overrides], world_size)
    fitted = load_recipe(None, [*QUICK, *overrides, *found], world_size)
    mesh = fitted.mesh
    shard = world_size // mesh.replicate if mesh.shard == -1 else mesh.shard
    assert [str(n) for n in (mesh.replicate, shard, mesh.expert, fitted.global_train_batch_size)] == expected


def test_other_errors_are_not_followed_by_degrees() -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(None, [*QUICK, "mesh.shard=16", "model.d_model=7"], 8)
    assert "fits with" not in str(error.value)
