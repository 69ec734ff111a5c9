"""The processes of the sandbox: one holds the program and answers calls, the other holds the test and judges.

:func:`main` runs in a fresh Python without this package's environment. It confines itself and forks twice. The program
never shares a process with the test: all that comes back to the test is plain data (``plain.py``), and only the judge
holds the pipe of the verdict. Both are confined in the same way.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
from typing import Any, NoReturn

from moefoundry.evaluation.sandbox import kernel
from moefoundry.evaluation.sandbox.plain import decode, encode

_LONGEST_ANSWER = 16 << 20


class ProgramEndedError(BaseException):
    """The program can answer no more; no ``except Exception`` of a test hides it.

    Attributes:
        outcome: Value of an ``Outcome``.
    """

    def __init__(self, outcome: str, error: str) -> None:
        super().__init__(error)
        self.outcome = outcome


class Lines:
    """JSON values, one a line, on two pipes."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self._rest = b""

    def send(self, value: Any) -> None:
        text = memoryview(json.dumps(value).encode() + b"\n")
        while text:
            text = text[os.write(self.outgoing, text) :]

    def receive(self) -> Any:
        """Return the next value.

        Raises:
            EOFError: The other end is closed.
            ValueError: The line is no JSON, or too long.
        """
        parts, size = [self._rest], len(self._rest)
        while b"\n" not in parts[-1]:
            if size > _LONGEST_ANSWER:
                raise ValueError(f"an answer of more than {_LONGEST_ANSWER} bytes")
            parts.append(os.read(self.incoming, 1 << 16))
            size += len(parts[-1])
            if not parts[-1]:
                raise EOFError
        line, self._rest = b"".join(parts).split(b"\n", 1)
        return json.loads(line)


def main() -> NoReturn:
    """Confine this process, then fork the judge. Arguments: descriptors of the job, the test and the verdict."""
    sys.path.pop()  # what this module was imported from
    kernel.die_with_parent()
    job_fd, test_fd, verdict_fd = map(int, sys.argv[1:4])
    with open(job_fd, encoding="utf-8") as file:
        job = json.load(file)
    if os.getppid() != job["parent"]:
        os._exit(1)  # it ended before this process could notice
    os.environ.clear()
    job["uid"] = kernel.FIRST_UID + os.getpid()
    readable, scratch, layers = kernel.readable_dirs(), job["scratch"], []
    if job["namespaces"] and kernel.enter_namespaces():
        layers.append("namespaces")
        if kernel.enter_root(job["root"], readable, job["file_bytes"]):
            layers.append("root")
            scratch = None
    judge = os.fork()
    if judge == 0:
        try:
            _judge(job, readable, scratch, layers, test_fd, verdict_fd)
        except EOFError:  # the program's process could not be confined, and has said why
            pass
        except BaseException as error:  # which the supervisor shows
            print(_last_line(error), file=sys.stderr)
        finally:
            os._exit(1)
    os.close(verdict_fd)
    os.close(test_fd)
    os.waitpid(judge, 0)
    os._exit(0)


def _judge(
    job: dict[str, Any], readable: list[str], scratch: str | None, layers: list[str], test_fd: int, verdict_fd: int
) -> None:
    """Start the program's process, run the test against it and write the verdict."""
    if kernel.drop_privileges(job["uid"], scratch):
        layers.append("uid")
    kernel.die_with_parent()
    kernel.hide_memory()
    os.chdir(scratch or kernel.SCRATCH)
    requests, answers = os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        try:
            for fd in (test_fd, verdict_fd, requests[1], answers[0]):
                os.close(fd)
            lines = Lines(requests[0], answers[1])
            lines.send(_confine(job, readable))
            _serve(job["program"], job["entry_point"], lines)
        except EOFError:  # the judge has ended
            pass
        except BaseException as error:
            print(_last_line(error), file=sys.stderr)
        finally:
            os._exit(1)
    os.close(requests[0])
    os.close(answers[1])
    with open(test_fd, encoding="utf-8") as file:
        test = json.load(file)
    lines = Lines(answers[0], requests[1])
    layers += lines.receive()  # what the program's process is confined by
    _confine(job, readable)
    with open(verdict_fd, "w", encoding="utf-8") as verdict:
        print(json.dumps(layers), file=verdict, flush=True)  # time counts from here
        outcome, line = _outcome(test, job["entry_point"], lines, program)
        print(json.dumps([outcome, line[:500]]), file=verdict, flush=True)


def _confine(job: dict[str, Any], readable: list[str]) -> list[str]:
    """Take the last rights from this process and return the names of what held."""
    kernel.die_with_parent()
    done = ["landlock"] if kernel.restrict_files(readable, os.getcwd()) else []
    kernel.limit(job["memory_bytes"], job["cpu_seconds"], job["file_bytes"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return [*done, "seccomp"] if kernel.restrict_calls() else done


def _serve(source: str, entry_point: str, lines: Lines) -> None:
    """Run the program when asked for the first time, then answer calls of its function."""
    lines.receive()
    for name in [name for name in sys.modules if name.startswith("moefoundry")]:
        del sys.modules[name]  # the program imports what Python has
    names: dict[str, Any] = {"__name__": "program"}
    answer = _answer(lambda: exec(compile(source, "<program>", "exec"), names))
    while True:
        lines.send(answer)
        args, kwargs = decode(lines.receive())
        answer = _answer(lambda args=args, kwargs=kwargs: _function(names, entry_point)(*args, **kwargs))


def _function(names: dict[str, Any], entry_point: str) -> Any:
    if entry_point not in names:
        raise NameError(f"name {entry_point!r} is not defined")
    return names[entry_point]


def _answer(call: Any) -> dict[str, Any]:
    try:
        return {"value": encode(call())}
    except Exception as error:
        return {"error": [_known_kind(error), _last_line(error)]}
    except BaseException as error:
        return {"end": _last_line(error)}


def _known_kind(error: BaseException) -> str:
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"), "Exception")


def _last_line(error: BaseException) -> str:
    """Describe an error in the words of the last line of its traceback."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _outcome(test: dict[str, str], entry_point: str, lines: Lines, program: int) -> tuple[str, str]:
    """Run the test. Returns the value of an ``Outcome``, or ``test`` if the test itself is broken, and the error."""
    names: dict[str, Any] = {"__name__": "test"}
    try:
        exec(compile(test["prelude"], "<prelude>", "exec"), names)
        code = compile(test["test"], "<test>", "exec")
    except Exception as error:
        return "test", _last_line(error)
    names[entry_point] = lambda *args, **kwargs: _ask(lines, program, [args, kwargs])
    try:
        _ask(lines, program, [])
        exec(code, names)
    except ProgramEndedError as error:
        return error.outcome, str(error)
    except MemoryError as error:
        return "memory", getattr(error, "line", _last_line(error))
    except BaseException as error:
        return "failed", getattr(error, "line", _last_line(error))
    return "passed", ""


def _ask(lines: Lines, program: int, request: list[Any]) -> Any:
    """Ask the program for one answer.

    Raises:
        ProgramEndedError: It has ended, or answers nonsense.
        Exception: The program's error, as the built-in kind that it is, with its ``line`` in the program's words.
    """
    try:
        lines.send(encode(request))
        answer = lines.receive()
        if "value" in answer:
            return decode(answer["value"])
        if "end" in answer:
            raise ProgramEndedError("failed", str(answer["end"]))
        name, line = map(str, answer["error"])
    except (EOFError, BrokenPipeError):
        raise _ended(program) from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProgramEndedError("failed", f"the program's answer is unreadable: {_last_line(error)}") from None
    kind = getattr(builtins, name, Exception)
    raised = kind() if isinstance(kind, type) and issubclass(kind, Exception) and _bare(kind) else Exception()
    raised.line = line  # type: ignore[attr-defined]
    raise raised


def _bare(kind: type[Exception]) -> bool:
    """Tell whether an exception needs no arguments."""
    return not issubclass(kind, UnicodeError | BaseExceptionGroup) or kind is UnicodeError


def _ended(program: int) -> ProgramEndedError:
    """Describe the end of the program's process."""
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    if status >= 0:
        return ProgramEndedError("failed", f"the program ended with status {status} before its test did")
    if -status == signal.SIGXCPU:
        return ProgramEndedError("timeout", "CPU time is used up")
    if -status == signal.SIGKILL:
        return ProgramEndedError("memory", "killed by the kernel, as it is when memory or CPU time is used up")
    return ProgramEndedError("failed", f"the program died of {signal.Signals(-status).name}")
