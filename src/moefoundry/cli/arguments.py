"""Arguments and options that several commands share, and groups of commands.

``config`` and torch are imported when a value is read: help stays fast.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    import torch
    from click.shell_completion import CompletionItem

RECIPE_COMMAND: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": ["--help"]}
"""Settings of a command with :func:`recipe_arguments`. ``-h`` is found among them, lest ``-path=3`` contain it."""

MAX_DIGITS = 18
MAX_RANKS = 1_000_000

_F = TypeVar("_F", bound=Callable[..., Any])


class Group(click.Group):
    """Commands whose errors name them, or the nearest to one that does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if not ctx.resilient_parsing and args[0] not in names and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise click.UsageError(f"{args[0]!r}: no such command; {hint}", ctx)
        return super().resolve_command(ctx, args)


def recipe_arguments(function: _F) -> _F:
    """Add ``[RECIPE] [KEY=VALUE]...``, passed on as ``arguments`` for ``config.split_arguments`` to take apart.

    Unknown options come with them, in the order in which they were written: the recipe loader words their errors.
    Errors of the recipe that are found later name its file, too.
    """

    @functools.wraps(function)
    def command(arguments: list[str], **options: Any) -> Any:
        from moefoundry.config.errors import ConfigError
        from moefoundry.config.overrides import split_arguments

        try:
            return function(arguments=arguments, **options)
        except ConfigError as error:
            if (path := split_arguments(arguments)[0]) is None:
                raise
            raise error.in_recipe(path) from error

    return click.argument(
        "arguments",
        nargs=-1,
        type=click.UNPROCESSED,
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A YAML file, then changes such as model.moe.top_k=4.",
        callback=_check_options,
        shell_complete=_complete_recipe,
    )(cast("_F", command))


def json_option(function: _F) -> _F:
    """Add ``--json``, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(function)


def ema_option(function: _F) -> _F:
    """Add ``--ema``."""
    return click.option("--ema", is_flag=True, help="Use the moving average of the parameters.")(function)


def device_option(function: _F) -> _F:
    """Add ``--device``, a name for :func:`device_named`."""
    text = "cpu, cuda, cuda:1, ... (default: a GPU if there is one)."
    return click.option("--device", metavar="NAME", help=text)(function)


def device_named(name: str | None) -> torch.device:
    """Return a device that works: a GPU by default, where there is one."""
    import torch

    from moefoundry.config import UserError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise UserError(f"device={name}: {str(error).splitlines()[0]}") from error
    return device


def input_argument(metavar: str, text: str, former: str = "") -> Callable[[_F], _F]:
    """Add a required positional input, passed on as ``source``: a path or a URL.

    Args:
        metavar: Its name in the help.
        text: Its description.
        former: An option by which earlier releases took it; it still works and is hidden.
    """
    add = click.argument("source", type=place, metavar=metavar, required=False, callback=required, help=text)
    return _and_former(add, former, "source", place)


def output_option(metavar: str, text: str, former: str = "") -> Callable[[_F], _F]:
    """Add the required ``-o/--output``, passed on as ``output``: a path. Arguments as of :func:`input_argument`."""
    text = f"{text}  [required]"
    add = click.option("-o", "--output", type=local_path, metavar=metavar, callback=required, help=text)
    return _and_former(add, former, "output", local_path)


def former_option(*flags: str, name: str, kind: Any, hidden: bool = True, **attributes: Any) -> Callable[[_F], _F]:
    """Add an option that gives the parameter ``name``, whose callback is :func:`either` or :func:`required`."""
    attributes |= {"hidden": hidden, "expose_value": False, "is_eager": True, "callback": _remember}
    return click.option(*flags, f"former_{name}", type=kind, **attributes)


def either(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Return the value of a parameter, or of the former option in its place.

    Raises:
        UsageError: Both are given.
    """
    flag, former = context.meta.get(f"{__name__}.{parameter.name}", ("", None))
    if value is not None and former is not None:
        raise click.UsageError(f"{name_of(parameter)} and {flag} are the same; give one", context)
    return former if value is None else value


def _and_former(add: Callable[[_F], _F], flag: str, name: str, kind: Any) -> Callable[[_F], _F]:
    former = former_option(flag, name=name, kind=kind) if flag else None
    return (lambda function: former(add(function))) if former else add


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None and parameter.name:
        context.meta[f"{__name__}.{parameter.name.removeprefix('former_')}"] = name_of(parameter), value


def required(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """As :func:`either`.

    Raises:
        UsageError: Neither or both are given.
    """
    value = either(context, parameter, value)
    if value is None and not context.resilient_parsing:
        raise click.MissingParameter(ctx=context, param=parameter)
    return value


def name_of(parameter: click.Parameter) -> str:
    """Name a parameter as its user writes it: the longest spelling of an option, the metavar of an argument."""
    return max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.human_readable_name


def _check_options(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str]:
    if "-h" in value:
        click.echo(context.get_help())
        context.exit()
    options = [flag for known in context.command.params if isinstance(known, click.Option) for flag in known.opts]
    for word in value:
        if word.startswith("--") and "=" not in word and (near := difflib.get_close_matches(word, options, 1, 0.7)):
            raise click.NoSuchOption(word, possibilities=near, ctx=context)
    return list(value)


def _complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys, then the values that a name, a boolean or null may be; and files for the first word."""
    from click.shell_completion import CompletionItem

    from moefoundry.config.spec import ANY_NAME, every_key

    words = []
    for key, spec in every_key().items():
        names = ["true", "false"] if spec.kind is bool else [*spec.kind] if _is_enum(spec.kind) else []
        if ANY_NAME not in key.split("."):
            words += [f"{key}={value}" for value in ["", *names, *["null"] * spec.optional]]
    items = [CompletionItem(word) for word in words if word.startswith(incomplete)]
    return items if items and incomplete else [CompletionItem(incomplete, type="file")]


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def positive(text: str) -> int:
    """Read a positive integer in decimal digits, as many as an int64 holds."""
    if len(text) > MAX_DIGITS:
        raise click.BadParameter(f"{text[:MAX_DIGITS]}... has {len(text)} digits; at most {MAX_DIGITS} are read")
    if not text.isdecimal() or int(text) == 0:
        raise click.BadParameter(f"{text!r} is not a positive integer")
    return int(text)


def num_ranks(text: str) -> int:
    """Read a number of ranks."""
    if (number := positive(text)) > MAX_RANKS:
        raise click.BadParameter(f"{text} is more than {MAX_RANKS:,}")
    return number


class Number(click.FloatRange):
    """A finite number; click's own takes ``nan`` for any range."""

    name = "number"

    def _describe_range(self) -> str:
        """Describe the bounds for the help; click's own says ``x<=None`` where there are none."""
        return "" if self.min is self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def place(text: str) -> str:
    """Read a path, or a URL as ``config/urls.py`` has it. ``file://`` becomes a path."""
    from moefoundry.config.urls import resolved, url_problem

    if problem := url_problem(text):
        raise click.BadParameter(f"{text!r}: {problem}")
    return resolved(text)


def local_path(text: str) -> Path:
    """Read a path of this machine."""
    from moefoundry.config.urls import path_problem, resolved

    if problem := path_problem(text):
        raise click.BadParameter(f"{text!r}: {problem}")
    return Path(resolved(text))


def check_writable(file: Path) -> None:
    """Try to write a file, before what takes long; its content stays as it is.

    Raises:
        OSError: It cannot be written.
    """
    if (there := file.exists()) and not file.is_file() and not file.is_dir():
        return  # a pipe, whose reader would take the trial for its end
    with file.open("ab"):
        pass
    if not there:
        file.unlink(missing_ok=True)  # several ranks may try


@contextmanager
def options_named(flags: Mapping[str, str]) -> Iterator[None]:
    """Turn ``max_loss=0.5`` into ``--max-loss 0.5`` in errors of the library, which name its own arguments.

    ``max_loss=...``, with any value, becomes ``--max-loss``, and ``overwrite=True`` becomes ``--overwrite``.

    Args:
        flags: Options of the command by the arguments that they give.

    Raises:
        UserError: The body raised it.
    """
    from moefoundry.config.errors import ConfigError, UserError

    try:
        yield
    except ConfigError:  # of keys, which it names
        raise
    except UserError as error:
        pattern = rf"(?<![\w.])({'|'.join(flags)})=(True\b|\.\.\.)?"
        text = re.sub(pattern, lambda match: flags[match[1]] + ("" if match[2] else " "), str(error))
        raise type(error)(text) from error


def flags_of(*names: str) -> dict[str, str]:
    """Map arguments of the library to the options of the same name."""
    return {name: f"--{name.replace('_', '-')}" for name in names}
