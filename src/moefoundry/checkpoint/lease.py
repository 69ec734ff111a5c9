"""One run at a time has a ``run_dir``: while it lives, its rank 0 holds the file ``lease.json`` there.

Two rules make this hold on local disks and on file systems that hosts share, without file locks:

- A lease is taken by creating the file exclusively, which is atomic on all of them. A stale one is replaced by renaming
  over it a second file, whose name has the stale lease's token: of several starters, one creates that file.
- A holder of this host lives if its process does: the same number, started at the same time. A holder of another host,
  or of another container, lives while its heartbeat does: the file's time, set anew every :data:`HEARTBEAT` seconds and
  compared with the time of a file that is written now, so that one clock, the file system's, tells both.

A run whose lease was taken over, because it was silent for :data:`SILENCE` seconds and then woke up, ends at once: what
it would write belongs to another.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

from moefoundry.config.errors import EXIT_USER_ERROR, UserError

LEASE_FILE = "lease.json"
HEARTBEAT = 5.0
SILENCE = 60.0
PAUSE = 0.5


@dataclass(frozen=True)
class Holder:
    """Holder of a lease.

    Attributes:
        token: Name of this lease alone.
        host: Name of the host, for people.
        kernel: Names the running kernel and the process namespace; empty where neither can be known.
        pid: Number of the process, in its ``kernel``.
        started: Start of the process, in the kernel's ticks; None where that cannot be known.
        since: Time at which the lease was taken, for people.
    """

    token: str
    host: str
    kernel: str
    pid: int
    started: int | None
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def identity(self) -> tuple[str, str, int, int | None]:
        """Name of the process, which no other has."""
        return self.host, self.kernel, self.pid, self.started


@dataclass(frozen=True)
class Observed:
    """A lease as a bystander sees it.

    Attributes:
        alive: True if its holder is, or may be.
        text: Holder, for people.
        since: Time at which the lease was taken, as the holder wrote it; empty where it is not known.
    """

    alive: bool
    text: str
    since: str


def observed(run_dir: Path) -> Observed | None:
    """Look at the lease of a run without touching anything; None where nobody holds it.

    The heartbeat of another host is compared with this host's clock.
    """
    lease = run_dir / LEASE_FILE
    try:
        beat = lease.stat().st_mtime
    except OSError:
        return None
    holder = _read(lease)
    if holder is not None and holder.kernel and holder.kernel == _kernel():
        alive = holder.started is not None and holder.started == _started(holder.pid)
    else:
        alive = time.time() - beat <= SILENCE
    if holder is None:
        return Observed(alive, "a process that has not named itself", "")
    return Observed(alive, str(holder), holder.since)


@contextmanager
def held(run_dir: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lease of ``run_dir``, which is made if need be; what is empty at the end is removed.

    Entered again by the process that holds it, it changes nothing.

    Args:
        run_dir: Directory of the run.
        patience: Seconds to wait for another run's end; its machine may just have been lost.

    Raises:
        UserError: Another run has it, or the directory cannot be written to.
    """
    made = make_directory(run_dir)
    try:
        own = _take(run_dir / LEASE_FILE, patience)
        if own is None:
            yield
            return
        stop = Event()
        beating = Thread(target=_beat, args=(run_dir / LEASE_FILE, own, stop), daemon=True, name="lease")
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            _release(run_dir / LEASE_FILE, own)
    finally:
        with suppress(OSError):  # not empty: the run has written something
            for directory in made:
                directory.rmdir()


def make_directory(run_dir: Path) -> list[Path]:
    """Create ``run_dir``. Returns the directories that were missing, innermost first.

    Raises:
        UserError: It cannot be created, or is something else.
    """
    missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"run_dir: {run_dir} is not a directory that can be written to") from error
    except OSError as error:
        raise UserError(f"run_dir: cannot create {run_dir}: {error.strerror}") from error
    return missing


def _take(lease: Path, patience: float) -> Holder | None:
    """Take the lease. Returns it, or None if this process has it already."""
    own, end = _this_process(), time.monotonic() + patience
    while not _create(lease, own):
        holder = _read(lease)
        if holder is not None and holder.identity == own.identity:
            return None
        if signs := _signs_of_life(lease, holder):
            if time.monotonic() < end:
                time.sleep(PAUSE)
                continue
            who = "another run, which is just starting" if holder is None else f"another run, {holder}"
            raise UserError(
                f"run_dir: {lease.parent} is in use by {who} ({signs}); wait for its end, or choose another run_dir"
            )
        if _replace(lease, holder, own):
            who = "a run that did not get to name itself" if holder is None else str(holder)
            print(f"note: run_dir {lease.parent}: taken over from {who}; it has ended", file=sys.stderr, flush=True)
            break
    return own


def _create(path: Path, own: Holder) -> bool:
    """Write ``own`` to a file that was not there; False if there is one."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with file:
            file.write(json.dumps(asdict(own)) + "\n")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    return True


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"run_dir: cannot write {path}: {error.strerror}")


def _replace(lease: Path, stale: Holder | None, own: Holder) -> bool:
    """Put ``own`` in the place of a stale lease; False if it is no longer there, or another process is doing the same.

    Who creates the file that is named after the stale lease goes on alone. If it can be created because another has
    just renamed it, the lease is not the stale one any more.
    """
    claim = lease.with_name(f"{lease.name}.{stale.token if stale else 'unnamed'}")
    if not _create(claim, own):
        if not _signs_of_life(claim, _read(claim)):  # its process has ended in here
            claim.unlink(missing_ok=True)
        return False
    found = _read(lease)
    if found != stale or not lease.exists():
        claim.unlink(missing_ok=True)
        return False
    claim.replace(lease)
    return True


def _read(path: Path) -> Holder | None:
    """Read a lease; None where it is not there, or was never finished."""
    try:
        holder = Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return holder if isinstance(holder.token, str) and holder.token.isalnum() else None  # it becomes a file's name


def _signs_of_life(path: Path, holder: Holder | None) -> str:
    """Say what shows that the holder lives, for a message; an empty string where nothing does."""
    if holder is not None and holder.kernel and holder.kernel == _kernel():
        alive = holder.started is not None and holder.started == _started(holder.pid)
        return "the process is alive" if alive else ""
    age = _age(path)
    if age is None or age > SILENCE:
        return ""
    return f"last sign of life {max(0, age):.0f} s ago, given up after {SILENCE:.0f} s"


def _age(path: Path) -> float | None:
    """Measure the seconds since the last heartbeat, by the file system's clock; None where there is no file."""
    try:
        with path.open() as file:  # opening asks the server; a bare stat may be answered from a cache
            beat = os.fstat(file.fileno()).st_mtime
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b".")
            probe.flush()
            return os.fstat(probe.fileno()).st_mtime - beat
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unwritable(path, error) from error


def _beat(lease: Path, own: Holder, stop: Event) -> None:
    """Show that this process lives, until it is told to stop; end it where the lease has become another's."""
    while not stop.wait(HEARTBEAT):
        with suppress(OSError, UserError):  # of a file system that is away for a while
            _create(lease, own)  # if someone has removed it
            holder = _read(lease)
            if holder is not None and holder.token != own.token:
                print(f"error: run_dir {lease.parent} was taken over by {holder}", file=sys.stderr, flush=True)
                os._exit(EXIT_USER_ERROR)
            os.utime(lease)


def _release(lease: Path, own: Holder) -> None:
    holder = _read(lease)
    if holder is not None and holder.token == own.token:
        lease.unlink(missing_ok=True)


def _this_process() -> Holder:
    since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    pid = os.getpid()
    return Holder(uuid.uuid4().hex, socket.gethostname(), _kernel(), pid, _started(pid), since)


def _kernel() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Read the start of a process, in ticks since its kernel's; None where it has ended or nothing is known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])
