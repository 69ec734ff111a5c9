"""Checks of the host: space, shared memory, limits, clock. None of them imports torch."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from moefoundry.doctor.finding import Finding, Status, graded

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
OPEN_FILES = 4096  # files of a rank with several loaders and shards, and sockets to its peers
CLOCK_SECONDS = 5.0
TIME_ERROR = 5  # of adjtimex: the clock is not synchronized
SIZE_OF_TIMEX = 512  # bytes, more than any kernel's


def host_checks(run_dir: Path) -> Iterator[Finding]:
    """Check the host of a run that would write to ``run_dir``."""
    yield memory()
    yield disk("run_dir", run_dir)
    yield disk("temporary", Path(tempfile.gettempdir()))
    yield shared_memory(SHARED_MEMORY)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _has_entries(INFINIBAND))
    yield clock(run_dir)


def memory() -> Finding:
    """Check cores and memory of the host."""
    found, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    text = f"{cores} cores for this process, {found.available / GIB:.1f} of {found.total / GIB:.1f} GiB are free"
    return graded("host", text, (found.available < GIB, Status.warning, "end other processes: training needs memory"))


def disk(name: str, directory: Path) -> Finding:
    """Check that a directory, or the one in which it would be made, can be written to and has room."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    usable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    free = shutil.disk_usage(place).free / GIB
    return graded(
        name,
        f"{place}: {free:.1f} GiB free",
        (not usable, Status.error, "it is no directory that can be written to; choose another"),
        (free < 1, Status.error, "a checkpoint takes up to 16 bytes a parameter; make room"),
        (free < 20, Status.warning, "a checkpoint takes up to 16 bytes a parameter"),
    )


def shared_memory(place: Path) -> Finding:
    """Check the shared memory, through which workers of loaders hand over batches."""
    if not place.is_dir():
        return Finding(
            "shared memory", Status.warning, f"{place} is not there", "loaders may fail; mount a tmpfs there"
        )
    usage = shutil.disk_usage(place)
    remedy = "start the container with --shm-size=8g or --ipc=host"
    return graded(
        "shared memory",
        f"{place}: {usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free",
        (usage.free < GIB / 16, Status.error, remedy),
        (usage.free < GIB, Status.warning, remedy),
    )


def open_files(soft: int) -> Finding:
    """Check the limit of open files."""
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft}"
    low = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    return graded("open files", f"at most {shown}", (low, Status.warning, "raise it: ulimit -n 65536"))


def locked_memory(soft: int, infiniband: bool) -> Finding:
    """Check the limit of locked memory, which InfiniBand needs."""
    unlimited = soft == resource.RLIM_INFINITY
    text = f"at most {'unlimited' if unlimited else f'{soft / GIB:.2f} GiB'}"
    text += "" if infiniband else "; no InfiniBand here that would need it"
    remedy = "NCCL over InfiniBand needs ulimit -l unlimited (in a container: --ulimit memlock=-1)"
    return graded("locked memory", text, (infiniband and not unlimited, Status.warning, remedy))


def clock(run_dir: Path) -> Finding:
    """Check that the clock is synchronized, and that the file system's agrees with it: a lease is judged by these."""
    place = run_dir.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b".")
            file.flush()
            apart = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        return Finding("clock", Status.warning, f"{place}: {error.strerror}", "its file system's clock is not known")
    unsynchronized = is_unsynchronized()
    remedy = "run chrony or another NTP client on all hosts, and on the file server"
    return graded(
        "clock",
        f"this host's and that of {place} differ by {abs(apart):.1f} s"
        + ("; the kernel says that it is not synchronized" if unsynchronized else ""),
        (abs(apart) > CLOCK_SECONDS, Status.warning, remedy),
        (unsynchronized, Status.warning, f"{remedy}, unless this is a container of a host that has one"),
    )


def is_unsynchronized() -> bool:
    """Ask the kernel whether its clock is not synchronized; False where it does not say."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    return adjtimex is not None and adjtimex(ctypes.create_string_buffer(SIZE_OF_TIMEX)) == TIME_ERROR


def _has_entries(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())
