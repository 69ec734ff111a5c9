"""System calls that confine a process of Linux: namespaces, a root of its own, Landlock, limits.

Each function does what the kernel permits and says whether it did; none of them can be undone by the process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import sysconfig

from moefoundry.evaluation.sandbox.seccomp import seccomp_filter

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_CLONE_OTHERS = 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000  # network, pids, IPC, host name
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_KEPT = ((1, 1), (2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))  # statvfs flag, mount flag
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_O_PATH = 0o10000000

NOBODY = 65534
FIRST_UID = 2_000_000_000
"""First of the uids that programs take where root starts them, beyond those that systems and containers give."""

SCRATCH = "/scratch"
"""Writable directory inside a root of its own."""


def readable_dirs() -> list[str]:
    """List the directories of Python and of the libraries that its modules load, none of them inside another."""
    found = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, "", "/usr") for lib in ("lib", "lib64")]
    found += [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    real = sorted({os.path.realpath(path) for path in found if os.path.isdir(path)})
    return [path for path in real if not any(path.startswith(f"{other}/") for other in real)]


def enter_namespaces() -> bool:
    """Move this process to its own mounts, network, IPC and host name, and its next child to its own pids."""
    uid, gid = os.getuid(), os.getgid()
    flags = _CLONE_NEWNS | _CLONE_OTHERS | (_CLONE_NEWUSER if uid else 0)
    if _libc.unshare(flags):
        return False
    maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {uid} 1", "gid_map": f"{NOBODY} {gid} 1"} if uid else {}
    try:
        for name, line in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    except OSError:
        return False
    return True


def enter_root(root: str, readable: list[str], scratch_bytes: int) -> bool:
    """Make ``root`` the root: the readable directories, read-only, and an empty scratch directory in memory.

    Args:
        root: An empty directory. Only this process and its children see the mounts on it.
        readable: Directories to be seen at their own paths.
        scratch_bytes: Bytes that the scratch directory holds at most, in at most 1024 files.
    """
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        _mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
        for path in readable:
            os.makedirs(root + path)
            _mount(path, root + path, None, _MS_BIND | _MS_REC)
            present = os.statvfs(root + path).f_flag
            kept = sum(mount for status, mount in _KEPT if present & status)  # a user may not take them away
            flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
            _mount(None, root + path, None, flags | kept)
        for link in ("/lib", "/lib64"):
            if os.path.islink(link):
                os.symlink(os.path.realpath(link), root + link)
        os.mkdir(root + SCRATCH)
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        _mount("none", root + SCRATCH, "tmpfs", flags, f"mode=1777,size={scratch_bytes},nr_inodes=1024")
        os.chdir(root)
        _checked(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."))
        _checked(_libc.umount2(b".", _MNT_DETACH))
        _mount(None, "/", None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
        os.chdir(SCRATCH)
    except (OSError, KeyError):
        return False
    return True


def drop_privileges(number: int, scratch: str | None) -> bool:
    """Give up every capability and, as root, the uid. Return whether it has ``number`` now.

    Args:
        number: A uid that nothing else has. The one of nobody is taken where the container has no such number, and
            the uid stays where neither could read Python.
        scratch: Directory to be given to the new uid; None where it is writable already.
    """
    for uid in (number, NOBODY) if os.getuid() == 0 else ():
        try:
            os.setgroups([])
            os.seteuid(uid)
            python_readable = os.access(os.__file__, os.R_OK, effective_ids=True)
            os.seteuid(0)
            if not python_readable:
                continue
            if scratch is not None:
                os.chown(scratch, uid, uid)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            break
        except OSError:
            continue
    own = os.getuid() == number
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(header, nothing))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return own


def die_with_parent() -> None:
    """Let this process be killed when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def hide_memory() -> None:
    """Close this process's entries of /proc to processes of the same uid."""
    _prctl(_PR_SET_DUMPABLE, 0)


def restrict_files(readable: list[str], scratch: str) -> bool:
    """Let Landlock refuse every file but those below ``readable`` (to read) and ``scratch`` (plain files, to write).

    Newer kernels also refuse TCP and signals to processes outside.
    """
    abi = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    files = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1  # every access that this kernel knows
    rights = (ctypes.c_uint64 * 3)(files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _libc.syscall(_LANDLOCK_CREATE, rights, ctypes.c_size_t(size), 0)
    read = 1 << 2 | 1 << 3  # files, directories
    write = read | 1 << 1 | 1 << 5 | 1 << 8 | (1 << 14 if abi >= 3 else 0)  # write, remove, make, truncate files
    for path, allowed in [*((path, read) for path in readable), (scratch, write)]:
        directory = os.open(path, _O_PATH | os.O_CLOEXEC)
        rule = allowed.to_bytes(8, sys.byteorder) + directory.to_bytes(4, sys.byteorder)
        _checked(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(directory)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)
    return True


def restrict_calls() -> bool:
    """Let seccomp refuse sockets, new processes, signals and whatever else a function that computes has no need of."""
    program = seccomp_filter(os.uname().machine)
    if program is None:
        return False
    kept = ctypes.create_string_buffer(program, len(program))
    head = (len(program) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(kept).to_bytes(8, sys.byteorder)
    return _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), head, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0


def limit(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """Set limits of this process: address space, CPU time, bytes of a file, open files, threads, no core file."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))  # a signal that has a name, then SIGKILL


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None))


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero))


def _checked(status: int) -> None:
    if status < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
