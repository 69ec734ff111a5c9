"""Exit statuses of commands, and the one line that an error is.

0    done
1    a failure that is not the user's: a traceback says where; or the answer is "no", where a command gives one
     (`checkpoint verify`, `plan --exit-code`)
2    something the user can put right, named in one line on standard error
75   training was stopped by a signal and has saved; `autoresume=true` goes on (``callbacks/signals.py``)
130  interrupted with Ctrl-C
141  the reader of the output has gone, as in `moefoundry generate ... | head`
143  ended by SIGTERM, where training had not begun; what was half written has been removed
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import click

from moefoundry.cli.arguments import name_of

EXIT_NO = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE  # what a shell reports of any other program
EXIT_TERMINATED = 128 + signal.SIGTERM


def exit_status(run: Callable[[], int]) -> int:
    """Run a command and return its status. What the user can put right is one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no reason to end
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is flushed at exit
        return EXIT_PIPE_CLOSED
    except Exception as error:
        if not (text := _user_error(error)):
            raise
        from moefoundry.config.errors import EXIT_USER_ERROR

        print(f"error: {text}", file=sys.stderr)
        return EXIT_USER_ERROR


def _user_error(error: Exception) -> str:
    """Describe an error that the user can put right, without secrets; return an empty string for any other."""
    from moefoundry.config.errors import UserError
    from moefoundry.config.secrets import redact

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, click.UsageError):
        return redact(_usage_error(error))
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return redact(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return ""


def _usage_error(error: click.UsageError) -> str:
    """Name the argument that is wrong, and show how the command is used."""
    text = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        near = "".join(f"; did you mean {option}?" for option in (error.possibilities or [])[:1])
        text = f"{error.option_name}: no such option{near}"
    elif isinstance(error, click.exceptions.NoArgsIsHelpError) and isinstance(error.ctx.command, click.Group):
        text = f"a command is missing; there are {', '.join(error.ctx.command.list_commands(error.ctx))}"
    elif isinstance(error, click.MissingParameter) and error.param:
        text = f"{name_of(error.param)} is missing"
    elif isinstance(error, click.BadParameter) and error.param:
        text = f"{name_of(error.param)}: {error.message.rstrip('.')}"
    return f"{text}\n{error.ctx.get_usage()} (--help says more)" if error.ctx else text


def refuse_other_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8.

    Raises:
        UsageError: Names the first of them.
    """
    for number, argument in enumerate(arguments, 1):
        content = os.fsencode(argument)
        try:
            content.decode()
        except UnicodeDecodeError:
            shown = content.decode(errors="backslashreplace")
            raise click.UsageError(f"argument {number} is not UTF-8 text: {shown}") from None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an error does, so that the body can clean up.

    Nothing changes where the signal has another meaning already, or outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:  # training has its own, to its end
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one ends it at once
    raise SystemExit(EXIT_TERMINATED)


def hide_secrets() -> None:
    """Hide secrets in all tracebacks, warnings and log records of this process, also those of libraries."""
    from moefoundry.config.secrets import redact

    if logging.getLogRecordFactory() is _record:
        return
    logging.setLogRecordFactory(_record)
    sys.excepthook = _show
    threading.excepthook = lambda args: _show(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: redact(plain(*args, **options))


def hide_arguments() -> None:
    """Hide secrets in the arguments of this process: in Python, and in its title, which every user can read."""
    from moefoundry.config.overrides import redact_argument

    for arguments in (sys.argv, sys.orig_argv):
        hidden = [redact_argument(argument) for argument in arguments]
        if hidden != arguments:
            arguments[:] = hidden
            os.environ.setdefault("SPT_NOENV", "1")  # the title takes no room of the environment
            from setproctitle import setproctitle

            setproctitle(" ".join(sys.orig_argv))


def _record(*args: Any, **options: Any) -> logging.LogRecord:
    from moefoundry.config.secrets import redact

    record = logging.LogRecord(*args, **options)
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # its caller's mistake, which logging reports
        return record
    if (hidden := redact(message)) != message:
        record.msg, record.args = hidden, ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
    return record


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from moefoundry.config.secrets import redact

    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
