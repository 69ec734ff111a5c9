"""The filter of system calls, as a program of the kernel's packet filter (BPF), for x86-64 and 64-bit ARM."""

from __future__ import annotations

import struct

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and the kernel's number of the architecture."""

_DENIED: dict[str, tuple[int | None, int | None]] = {
    # network, and memory that no limit counts
    "socket": (41, 198), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "io_setup": (206, 0),
    # processes: new ones, and those of others
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157),
    "setpgid": (109, 154), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "personality": (135, 92),
    # namespaces, mounts and the kernel itself
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "iopl": (172, None), "ioperm": (173, None),
    # attributes of files, which Landlock leaves open
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utimensat": (280, 88),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
}  # fmt: skip
_DENIED_IF = {  # call: its numbers, the argument that decides, its denied values
    "fcntl": ((72, 25), 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by another way
    "ioctl": ((16, 29), 1, (0x5412, 0x8901, 0x8902)),  # TIOCSTI, FIOSETOWN, SIOCSPGRP
}
_CLONE, _CLONE_THREAD = (56, 220), 0x00010000
_PRLIMIT64 = (302, 261)
_FIRST_NEW = 424
"""Calls from this number on (io_uring, clone3, pidfd_open, ...) count as unknown: libraries then use older ones."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets of what the filter sees; low halves of arguments


def seccomp_filter(machine: str) -> bytes | None:
    """Compile the filter for a machine by its ``uname`` name; None for one that has none."""
    if machine not in _MACHINES:
        return None
    column, architecture = _MACHINES[machine]
    lines = [_jump(_EQUAL, architecture, 1, 0), _do(_RETURN, _KILL), _do(_LOAD, _NUMBER)]
    lines.insert(0, _do(_LOAD, _ARCHITECTURE))
    lines += [_jump(_AT_LEAST, _FIRST_NEW, 0, 1), _do(_RETURN, _ENOSYS)]  # x86's other calling convention, too
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            lines += [_jump(_EQUAL, number, 0, 1), _do(_RETURN, _EPERM)]
    for numbers, argument, values in _DENIED_IF.values():
        tests = [part for value in values for part in (_jump(_EQUAL, value, 0, 1), _do(_RETURN, _EPERM))]
        lines += _for_call(numbers[column], argument, [*tests, _do(_RETURN, _ALLOW)])
    refuse = _do(_RETURN, _EPERM)
    lines += _for_call(_CLONE[column], 0, [_jump(_ANY_BIT, _CLONE_THREAD, 1, 0), refuse, _do(_RETURN, _ALLOW)])
    lines += _for_call(_PRLIMIT64[column], 0, [_jump(_EQUAL, 0, 1, 0), refuse, _do(_RETURN, _ALLOW)])
    return b"".join([*lines, _do(_RETURN, _ALLOW)])


def _for_call(number: int, argument: int, body: list[bytes]) -> list[bytes]:
    """Run ``body``, which returns, for one call with its argument loaded; go on behind it for others."""
    return [_jump(_EQUAL, number, 0, len(body) + 1), _do(_LOAD, _ARGUMENTS + 8 * argument), *body]


def _do(code: int, value: int) -> bytes:
    return _line(code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return _line(code, if_true, if_false, value)


def _line(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
