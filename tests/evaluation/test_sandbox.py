"""The sandbox: what a program may do, and what it must not, with and without namespaces."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.evaluation.sandbox.plain import Opaque, decode, encode
from moefoundry.evaluation.sandbox.run import _START, Ending, Limits, Outcome, SandboxError, run, statement
from moefoundry.evaluation.sandbox.seccomp import seccomp_filter

SHORT = Limits(seconds=0.3, memory_bytes=256 << 20)
PATIENT = Limits(seconds=30)  # for what ends by itself, on a busy machine too

both = pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "no namespaces"])


def body(*lines: str, test: str = "assert f() == 1", limits: Limits = PATIENT, namespaces: bool = True) -> Ending:
    """Run a function of these lines, which is to return 1."""
    return run(
        "def f():\n" + "".join(f"    {line}\n" for line in lines), test, "f", limits=limits, namespaces=namespaces
    )


@both
def test_the_test_decides(namespaces: bool) -> None:
    assert body("return 1", namespaces=namespaces).outcome is Outcome.PASSED
    ending = body("return 2", namespaces=namespaces)
    assert (ending.outcome, ending.error) == (Outcome.FAILED, "AssertionError")
    ending = body("return [][3]", namespaces=namespaces)
    assert (ending.outcome, ending.error) == (Outcome.FAILED, "IndexError: list index out of range")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("def g(): pass", "NameError: name 'f' is not defined"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("class Odd(Exception): pass\ndef f(): raise Odd('so')", "Odd: so"),
        ("def f(): return f()", "RecursionError: maximum recursion depth exceeded"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("import moefoundry", "ModuleNotFoundError: No module named 'moefoundry'"),
    ],
)
def test_errors_of_the_program(program: str, error: str) -> None:
    ending = run(program, "f()", "f", limits=PATIENT)
    assert (ending.outcome, ending.error) == (Outcome.FAILED, error)


def test_a_test_may_expect_an_error_and_call_helpers() -> None:
    test = "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass\nassert double(f(0)) == 6"
    program = "def double(x): return 0\ndef f(x):\n    if x: raise ValueError('no')\n    return 3"
    prelude = "def double(x): return 2 * x\ndef f(x): ..."
    assert run(program, test, "f", prelude=prelude, limits=PATIENT).outcome is Outcome.PASSED


def test_a_broken_test_is_no_failure_of_the_program() -> None:
    with pytest.raises(SandboxError, match="the test is broken: SyntaxError"):
        run("def f(): pass", "assert (", "f")


def test_a_program_that_cannot_be_confined_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import moefoundry.evaluation.sandbox.kernel as kernel; kernel.restrict_calls = lambda: 1 / 0; main()"
    monkeypatch.setattr("moefoundry.evaluation.sandbox.run._START", _START.replace("main()", broken))
    with pytest.raises(SandboxError, match="the sandbox did not start: ZeroDivisionError: division by zero"):
        body("return 1")


# Faked passes.


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(): import sys; sys.exit(0)",
        "def f(): import os; os._exit(0)",
        "def f(): raise KeyboardInterrupt",
        "def f(): raise SystemExit('passed')",
        'def f(): print(\'["passed", ""]\', flush=True)',
        # an assert that cannot fail, by builtins, by modules and by the frames above
        "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\ndef f(): return 2",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(): return 2",
        "import sys, json\njson.loads = lambda *a: {'value': 1}\n"
        'json.dumps = lambda *a: \'["passed", ""]\'\ndef f(): pass',
        "import sys\ndef f():\n    frame = sys._getframe()\n"
        "    while frame:\n        frame.f_globals.clear(); frame = frame.f_back",
        "class Same:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(): return Same()",
        "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(): return Same(7)",
        "class Same(list):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(): return Same()",
        # the verdict in every pipe and file that is open
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'["passed", ""]\\n\')\n    except OSError: pass',
        "import gc\nfor o in gc.get_objects():\n    if hasattr(o, 'send') and hasattr(o, 'outgoing'):\n"
        "        o.send(['passed', ''])\n        o.send({'value': 2})\ndef f(): return 2",
    ],
)
def test_a_pass_cannot_be_faked(program: str) -> None:
    assert run(program, "assert f() == 1", "f", limits=PATIENT).outcome is Outcome.FAILED


def test_the_program_does_not_hold_the_test() -> None:
    """Neither its objects nor the memory that a fork would have left behind."""
    lines = ["import gc", "found = [o for o in gc.get_objects() if '_'.join(['hidden', 'answer']) in repr(o)[:10000]]"]
    ending = body(*lines, "return len(found) + 1", test="hidden_answer = 1\nassert f() == hidden_answer")
    assert ending.outcome is Outcome.PASSED, ending


# Limits.


@both
def test_an_endless_loop(namespaces: bool) -> None:
    assert body("while True: pass", limits=SHORT, namespaces=namespaces).outcome is Outcome.TIMEOUT


def test_a_sleep_and_ignored_signals() -> None:
    lines = "import signal, time", "[signal.signal(n, signal.SIG_IGN) for n in (2, 15, 24)]", "time.sleep(60)"
    began = time.monotonic()
    assert body(*lines, limits=SHORT).outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < 20


def test_a_trickle_of_output_does_not_stop_the_clock() -> None:
    ending = body("import os", "while True: os.write(1, b'x')", limits=Limits(seconds=0.3, output_bytes=1 << 40))
    assert ending.outcome is Outcome.TIMEOUT


def test_cpu_time_that_is_used_up() -> None:
    lines = "import resource", "resource.setrlimit(resource.RLIMIT_CPU, (1, 2))", "while True: pass"
    ending = body(*lines)
    assert (ending.outcome, ending.error) == (Outcome.TIMEOUT, "CPU time is used up")


@both
def test_an_allocation_of_10_gb(namespaces: bool) -> None:
    ending = body("return len(bytearray(10 << 30)) and 1", namespaces=namespaces)
    assert (ending.outcome, ending.error) == (Outcome.MEMORY, "MemoryError")
    assert body("x = [0]", "while True: x += x", namespaces=namespaces).outcome is Outcome.MEMORY


def test_shared_memory_counts_too() -> None:
    assert body("import mmap", "return len(mmap.mmap(-1, 10 << 30)) and 1").outcome is Outcome.FAILED
    assert body("import os", "os.memfd_create('x')").error == "PermissionError: [Errno 1] Operation not permitted"


def test_endless_output() -> None:
    for stream in ("stdout", "stderr"):
        ending = body("import sys", f"while True: sys.{stream}.write('x' * 1000)")
        assert (ending.outcome, ending.error) == (Outcome.OUTPUT, "more than 1048576 bytes of output")
    assert body("print('x' * 1000000)", "return 1").outcome is Outcome.PASSED


@pytest.mark.slow
def test_an_endless_answer() -> None:
    assert body("return 'x' * (20 << 20)").error.startswith("the program's answer is unreadable")


@both
def test_a_fork_bomb(namespaces: bool) -> None:
    ending = body("import os", "while True: os.fork()", limits=PATIENT, namespaces=namespaces)
    assert (ending.outcome, ending.error) == (Outcome.FAILED, "PermissionError: [Errno 1] Operation not permitted")
    ending = body("import subprocess", "subprocess.run(['true'])", namespaces=namespaces)
    assert ending.outcome is Outcome.FAILED


def test_threads_are_few() -> None:
    lines = "import threading, time", "for _ in range(1000): threading.Thread(target=time.sleep, args=[60]).start()"
    assert body(*lines).error == "RuntimeError: can't start new thread"
    one = "import threading", "t = threading.Thread(target=print); t.start(); t.join()", "return 1"
    assert body(*one).outcome is Outcome.PASSED


# The world outside.


@both
def test_a_write_outside(namespaces: bool, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o666)
    for place in (tmp_path / "new", victim, "/tmp/moefoundry-outside", "/moefoundry-outside", os.__file__):
        ending = body(f"open({str(place)!r}, 'a').write('x')", "return 1", namespaces=namespaces)
        assert ending.outcome is Outcome.FAILED, place
    for call in (f"os.remove({str(victim)!r})", f"os.chmod({str(victim)!r}, 0)", f"os.utime({str(victim)!r})"):
        assert body("import os", call, "return 1", namespaces=namespaces).outcome is Outcome.FAILED, call
    assert victim.read_text() == "mine"
    assert victim.stat().st_mode & 0o777 == 0o666
    assert not (tmp_path / "new").exists()


@both
def test_the_scratch_directory(namespaces: bool) -> None:
    lines = "open('note', 'w').write('1')", "import os", "number = int(open('note').read())", "os.remove('note')"
    assert body(*lines, "return number", namespaces=namespaces).outcome is Outcome.PASSED
    ending = body("open('big', 'wb').write(bytes(32 << 20))", "return 1", namespaces=namespaces)
    assert ending.error in ("OSError: [Errno 27] File too large", "OSError: [Errno 28] No space left on device")
    assert body("import os", "return 1 + len(os.listdir())", namespaces=namespaces).outcome is Outcome.PASSED


@both
def test_secrets(namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFOUNDRY_SECRET", "s3cret")
    assert body("import os", "return 1 + len(os.environ)", namespaces=namespaces).outcome is Outcome.PASSED
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    for parent in [secret, *secret.parents[:-1]]:
        assert parent.exists()
    secret.chmod(0o644)
    places = [secret, "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/environ", "/proc/1/environ", __file__]
    for place in map(str, places):
        ending = body(f"return len(open({place!r}).read()) and 1", namespaces=namespaces)
        assert ending.outcome is Outcome.FAILED, place
    ending = body("import os", f"return len(os.listdir({str(tmp_path)!r}))", namespaces=namespaces)
    assert ending.outcome is Outcome.FAILED


@both
def test_a_socket(namespaces: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        ending = body("import socket", f"socket.create_connection({address!r}, 5)", "return 1", namespaces=namespaces)
        assert ending.error == "PermissionError: [Errno 1] Operation not permitted"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@both
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_parent(namespaces: bool, number: int) -> None:
    for target in (f"{os.getpid()}", "os.getppid()", "-1", "0"):
        ending = body("import os", f"os.kill({target}, {number})", namespaces=namespaces)
        assert ending.error == "PermissionError: [Errno 1] Operation not permitted", target


def test_limits_of_others_stay() -> None:
    ending = body("import resource", f"resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (1, 1))")
    assert ending.error == "PermissionError: [Errno 1] Operation not permitted"


def test_programs_side_by_side_do_not_meet() -> None:
    endings: list[Ending] = []
    lines = "open('note', 'x').write('1')", "import time; time.sleep(0.3)", "return int(open('note').read())"
    threads = [threading.Thread(target=lambda: endings.append(body(*lines))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ending.outcome for ending in endings] == [Outcome.PASSED] * 3


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o711)
    descriptors = len(os.listdir("/proc/self/fd"))
    for namespaces in (True, False):
        body("open('left', 'w').write('x')", "while True: pass", limits=SHORT, namespaces=namespaces)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_outlives_whoever_started_it(tmp_path: Path) -> None:
    script = (
        "from moefoundry.evaluation.sandbox.run import Limits, run\n"
        "run('import time; time.sleep(600)', '', 'f', limits=Limits(seconds=600))"
    )
    starter = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    tmp_path.chmod(0o711)
    try:
        wait_until(lambda: len(descendants(starter.pid)) == 3, "three processes")
        started = descendants(starter.pid)
    finally:
        starter.kill()
        starter.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "the end of all of them")


def descendants(pid: int) -> list[int]:
    """Process ids of a process's children, and theirs."""
    try:
        files = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(word) for text in files for word in text.split()]
    return children + [each for child in children for each in descendants(child)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a program under another uid")
def test_root_gives_up_its_uid() -> None:
    test = "uid, again = f()\nassert uid >= 2_000_000_000\nassert not again"
    lines = "import os", "uid = os.getuid()", "try: os.setuid(0)", "except OSError: return uid, False"
    assert body(*lines, "return uid, True", test=test).outcome is Outcome.PASSED


# Words and forms.


def test_the_statement_follows_the_layers() -> None:
    assert "NOT stopped: network" in statement(frozenset())
    assert "NOT stopped: reading files" in statement(frozenset({"seccomp"}))
    everything = statement(frozenset({"namespaces", "root", "uid", "landlock", "seccomp"}))
    assert [line for line in everything.splitlines() if "NOT" in line] == ["NOT stopped: errors of the kernel itself"]
    here = body("return 1").layers
    assert statement() == statement(here)


def test_plain_data_cross_both_ways() -> None:
    big = {1: [1, 2.5, None, True], (1, "a"): {1, 2}, "long": 1 << 100, "z": 2 + 1j, b"x": frozenset([b"y"])}
    for value in (big, [], (), "\udcff", float("inf"), range(3, 9, 2), -(1 << 53)):
        assert decode(encode(value)) == value
        assert type(decode(encode(value))) is type(value)
    assert list(decode(encode(iter([1, 2])))) == [1, 2]
    assert isinstance(decode(encode(object())), Opaque)
    for bad in ([1], {"module": "os"}, {"int": 3}, {"dict": [[{"list": []}, 1]]}, {"list": 1}, {}):
        with pytest.raises(ValueError, match=r"no plain data|a bare list"):
            decode(bad)


def test_machines_without_a_filter() -> None:
    assert seccomp_filter("riscv64") is None
    assert {len(seccomp_filter(name) or b"") % 8 for name in ("x86_64", "aarch64")} == {0}
