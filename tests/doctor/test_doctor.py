"""``moefoundry doctor``: each check on a machine that is well and on one that is not."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moefoundry.doctor import all_reduce as module
from moefoundry.doctor import devices, host
from moefoundry.doctor.all_reduce import all_reduce
from moefoundry.doctor.finding import Finding, Status
from moefoundry.doctor.versions import locked, version_checks
from tests.distributed import captured_output, run_distributed

GIB = 2**30
ROOT = Path(__file__).parents[2]


def space(total: float, free: float) -> SimpleNamespace:
    return SimpleNamespace(total=int(total * GIB), free=int(free * GIB))


@pytest.mark.parametrize(
    ("free", "status"), [(100, Status.ok), (5, Status.warning), (0.5, Status.error)], ids=["room", "little", "none"]
)
def test_disk(free: float, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.shutil, "disk_usage", lambda place: space(200, free))
    found = host.disk("run_dir", tmp_path / "not" / "yet" / "there")
    assert found.status is status
    assert found.text == f"{tmp_path}: {free:.1f} GiB free"


def test_a_file_in_the_way_of_run_dir(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert host.disk("run_dir", tmp_path / "runs" / "mine").status is Status.error


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((8, Status.ok), (0.5, Status.warning), (0.03, Status.error)):
        monkeypatch.setattr(host.shutil, "disk_usage", lambda place, free=free: space(8, free))
        found = host.shared_memory(tmp_path)
        assert found.status is status
        assert ("--shm-size" in found.remedy) == (status is not Status.ok)
    assert host.shared_memory(tmp_path / "absent").status is Status.warning


def test_limits() -> None:
    infinity = resource.RLIM_INFINITY
    assert host.open_files(65536).status is host.open_files(infinity).status is Status.ok
    assert host.open_files(256) == Finding("open files", Status.warning, "at most 256", "raise it: ulimit -n 65536")
    assert host.locked_memory(infinity, infiniband=True).status is Status.ok
    assert host.locked_memory(65536, infiniband=True).status is Status.warning
    assert host.locked_memory(65536, infiniband=False).status is Status.ok


def test_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(host.is_unsynchronized(), bool)
    monkeypatch.setattr(host, "is_unsynchronized", lambda: False)
    assert host.clock(tmp_path / "new").status is Status.ok
    now = time.time()
    monkeypatch.setattr(host.time, "time", lambda: now + 3600)
    assert "differ by 3600." in host.clock(tmp_path).text
    assert host.clock(tmp_path).status is Status.warning
    monkeypatch.undo()
    monkeypatch.setattr(host, "is_unsynchronized", lambda: True)
    assert "not synchronized" in host.clock(tmp_path).text


def test_versions(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==2.14.1\nomegaconf==2.4.0\nother==1.0\n")
    assert locked(lock) == {"torch": "2.14.1", "omegaconf": "2.4.0", "other": "1.0"}
    versions = {"torch": "2.14.1+cu130", "omegaconf": "2.3.0", "other": "1.0"}
    found = {each.name: each for each in version_checks(lock, lambda name: versions.get(name, "1"))}
    assert found["packages"].status is Status.ok
    assert found["tested versions"].status is Status.warning
    assert found["tested versions"].text == "omegaconf 2.3.0 for 2.4.0"
    found = {each.name: each for each in version_checks(lock, lambda name: None if name == "torch" else "1")}
    assert found["packages"].status is Status.error
    assert found["packages"].text == "torch is not installed"
    found = {each.name: each for each in version_checks(tmp_path / "absent")}
    assert found["tested versions"].status is Status.ok
    assert all(each.status is Status.ok for each in version_checks(ROOT / "requirements.lock"))


RANK = "import sys, time; rank = int(sys.argv[1]); "
RESULT = """print('gloo'); print('{"backend": "gloo", "bytes": 4194304, "seconds": 0.002}')"""


@pytest.mark.parametrize(
    ("program", "status", "text"),
    [
        (RESULT, Status.ok, "2 ranks, gloo: the sum is right; 4 MiB in 2.0 ms"),
        ("rank and time.sleep(60); " + RESULT, Status.error, "ranks 1 of 2 did not end within 2 s"),
        (
            "rank or time.sleep(60); sys.exit('no such device')",
            Status.error,
            "rank 1 of 2 ended with 1: no such device",
        ),
    ],
    ids=["well", "hangs", "fails"],
)
def test_ranks_that_end_hang_and_fail(program: str, status: Status, text: str) -> None:
    begun = time.monotonic()
    found = all_reduce(2, 2.0, (sys.executable, "-c", RANK + program))
    assert (found.status, found.text) == (status, text)
    assert time.monotonic() - begun < 30


def one_rank(file: str) -> list[str]:
    with captured_output() as texts:
        module.run_rank(0, 1, file, 30.0)
    return texts


def test_a_rank_sums(tmp_path: Path) -> None:
    ((out, _),) = run_distributed(one_rank, 1, str(tmp_path / "store"))
    backend, result = out.splitlines()
    assert json.loads(result)["backend"] == backend
    assert json.loads(result)["bytes"] == 4 * module.ELEMENTS[backend]


def gpus_of_another_machine() -> list[str]:
    import torch

    cuda = torch.cuda
    cuda.is_available = lambda: True  # type: ignore[method-assign]
    cuda.device_count = lambda: 2  # type: ignore[method-assign]
    kinds = [("H100", 9, 0), ("B200", 10, 0)]
    cuda.get_device_properties = lambda index: SimpleNamespace(  # type: ignore[method-assign]
        name=kinds[index][0], major=kinds[index][1], minor=kinds[index][2]
    )
    cuda.mem_get_info = lambda index: ((70 if index else 79) * GIB, 80 * GIB)  # type: ignore[method-assign]
    cuda.get_arch_list = lambda: ["sm_80", "sm_90", "compute_90"]  # type: ignore[method-assign]
    cuda.nccl.version = lambda: (2, 30, 7)  # type: ignore[method-assign]
    torch._C._cuda_getDriverVersion = lambda: 12040  # type: ignore[attr-defined]
    torch.version.cuda = "13.0"
    return [str(finding) for finding in devices.device_checks()]


def test_gpus() -> None:
    (lines,) = run_distributed(gpus_of_another_machine, 1)
    assert [line.split("  ")[0] for line in lines] == ["OK", "error", "warning", "OK"]
    first, second, driver, nccl = lines
    assert "H100, sm_90, 79.0 of 80.0 GiB free" in first
    assert "torch was built for sm_80, sm_90, compute_90; install one that has sm_100" in second
    assert "CUDA 12.4 by the driver, torch was built for 13.0" in driver
    assert "2.30.7" in nccl


@pytest.mark.slow
def test_the_command_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moefoundry", "doctor", "--json", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["healthy"] else 1)
    (summed,) = [check for check in found["checks"] if check["name"] == "all-reduce"]
    assert summed["status"] == "OK", summed
