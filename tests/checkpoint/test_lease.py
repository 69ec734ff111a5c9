"""One run at a time has a run directory, whoever dies, and whenever."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moefoundry.checkpoint import lease
from moefoundry.checkpoint.lease import LEASE_FILE, Holder, held
from moefoundry.config import UserError

HOLD = """
import sys
from pathlib import Path
from moefoundry.checkpoint.lease import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def other_holder(run_dir: Path, *command: str) -> subprocess.Popen[str]:
    """Another process that has the lease until its standard input is closed."""
    process = subprocess.Popen(
        [*command, sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def written(run_dir: Path, *, silent_for: float, **changes: object) -> Holder:
    """A lease as another process has left it, whose last heartbeat was that many seconds ago."""
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = replace(lease._this_process(), **{"pid": 1, "started": 1, **changes})  # type: ignore[arg-type]
    path = run_dir / LEASE_FILE
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - silent_for,) * 2)
    return holder


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "b" / "run"
    with held(run_dir):
        holder = json.loads((run_dir / LEASE_FILE).read_text())
        assert holder["pid"] == os.getpid()
        assert holder["host"]
    assert list(tmp_path.iterdir()) == []
    with held(run_dir):
        (run_dir / "file").write_text("")
    assert [path.name for path in run_dir.iterdir()] == ["file"]


def test_the_lease_ends_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path / "run"):
        raise RuntimeError
    with held(tmp_path / "run"):
        pass


def test_the_process_that_has_it_may_enter_again(tmp_path: Path) -> None:
    with held(tmp_path):
        with held(tmp_path):
            pass
        assert (tmp_path / LEASE_FILE).exists()


def test_a_living_run_on_this_host_is_named_at_once_and_a_killed_one_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = other_holder(tmp_path / "run")
    os.utime(tmp_path / "run" / LEASE_FILE, (0, 0))  # a process that is stopped is not dead
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"run_dir: .*/run is in use by another run, process {process.pid} on \S+, si"):
        held(tmp_path / "run").__enter__()
    assert time.monotonic() - begin < 1
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which a launcher may leave for a while
    try:
        with held(tmp_path / "run"):
            assert f"taken over from process {process.pid} on" in capsys.readouterr().err
    finally:
        process.wait()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    written(tmp_path, silent_for=0, pid=os.getppid(), started=1)
    with held(tmp_path):
        pass


@pytest.mark.parametrize("kernel", ["another kernel pid:[1]", ""], ids=["another host", "nothing known"])
def test_a_run_elsewhere_lives_while_its_heartbeat_does(tmp_path: Path, kernel: str) -> None:
    written(tmp_path, silent_for=20, host="node7", kernel=kernel)
    with pytest.raises(UserError, match=r"process 1 on node7.*last sign of life (19|20|21) s ago, given up after 60 s"):
        held(tmp_path).__enter__()
    written(tmp_path, silent_for=61, host="node7", kernel=kernel)
    with held(tmp_path):
        assert Holder(**json.loads((tmp_path / LEASE_FILE).read_text())).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_start_may_wait_for_the_end_of_a_run_whose_machine_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PAUSE", 0.01)
    written(tmp_path, silent_for=lease.SILENCE - 1, kernel="of another machine")
    with pytest.raises(UserError, match="is in use"), held(tmp_path, patience=0.05):
        pass
    with held(tmp_path, patience=60):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()


def test_a_clock_that_is_wrong_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are the file system's: that of this host may be off by hours."""
    written(tmp_path, silent_for=0, host="node7", kernel="another kernel")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(UserError, match="last sign of life 0 s ago"):
        held(tmp_path).__enter__()


@pytest.mark.parametrize("content", ["", "{", '{"token": "../../escape"}', "[]"])
def test_a_lease_that_says_nothing_is_waited_for_and_then_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / LEASE_FILE
    path.write_text(content)
    with pytest.raises(UserError, match="in use by another run, which is just starting"):
        held(tmp_path).__enter__()
    os.utime(path, (time.time() - 61,) * 2)
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_takeover_that_was_killed_has_left_is_no_obstacle(tmp_path: Path) -> None:
    stale = written(tmp_path, silent_for=0)
    claim = tmp_path / f"{LEASE_FILE}.{stale.token}"
    claim.write_text((tmp_path / LEASE_FILE).read_text())
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_slow_starter_does_not_take_what_another_has_just_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at a stale lease and its own attempt, another takes over: as it would be at the worst moment."""
    written(tmp_path, silent_for=0)
    create = lease._create
    taken: list[subprocess.Popen[str]] = []

    def late(path: Path, own: Holder) -> bool:
        if path.name != LEASE_FILE and not taken:
            taken.append(other_holder(tmp_path))
        return create(path, own)

    monkeypatch.setattr(lease, "_create", late)
    with pytest.raises(UserError, match=r"in use by another run, process \d+"):
        held(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [LEASE_FILE]
    taken[0].communicate()


def contend(run_dir: Path, start: float, holders: Path) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        with held(run_dir):
            number = len(list(holders.iterdir()))
            (holders / str(os.getpid())).write_text(str(number))
            time.sleep(0.2)
            (holders / str(os.getpid())).unlink()
            (holders.parent / f"won-{os.getpid()}-{number}").write_text("")
    except UserError:
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_wins(tmp_path: Path, stale: bool) -> None:
    if stale:
        written(tmp_path / "run", silent_for=0)
    (tmp_path / "holders").mkdir()
    fork = multiprocessing.get_context("fork")
    start = time.time() + 0.5
    processes = [fork.Process(target=contend, args=(tmp_path / "run", start, tmp_path / "holders")) for _ in range(12)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    won = [path.name for path in tmp_path.glob("won-*")]  # on a busy machine some start when another has ended
    assert won
    assert all(name.endswith("-0") for name in won), "no other had it meanwhile"


def beating(run_dir: Path, seconds: float, taken_over: Callable[[], None] | None) -> None:
    lease.HEARTBEAT = 0.05
    with held(run_dir):
        if taken_over is not None:
            taken_over()
        time.sleep(seconds)


def test_a_holder_beats_and_renews_what_someone_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    path = tmp_path / LEASE_FILE
    with held(tmp_path):
        os.utime(path, (0, 0))
        time.sleep(0.2)
        assert path.stat().st_mtime > 0
        path.unlink()
        time.sleep(0.2)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_run_that_was_taken_over_ends_and_leaves_the_lease_to_its_new_holder(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=beating, args=(tmp_path, 30, lambda: written(tmp_path, silent_for=0, host="node7"))
    )
    process.start()
    process.join(20)
    assert process.exitcode == 2
    assert json.loads((tmp_path / LEASE_FILE).read_text())["host"] == "node7"


def test_a_file_system_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *args, **options: (_ for _ in ()).throw(PermissionError(13, "Denied")))
    with pytest.raises(UserError, match=rf"^run_dir: cannot write {tmp_path}/{LEASE_FILE}: Denied$"):
        held(tmp_path).__enter__()
