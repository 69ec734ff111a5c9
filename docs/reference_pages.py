"""Pages of the site that are made of the code: the Python API and the command line; a hook of mkdocs.

The docstrings of the API are read by mkdocstrings, which runs none of the code. The help of the commands is what
``--help`` prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import moefoundry
from moefoundry.cli.main import commands

API, COMMANDS = "api.md", "commands.md"
WIDTH = 100
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?")
"""Sphinx's way to name what a docstring refers to, as it stands in the page."""

WITHOUT_MEMBERS = {"Recipe": "Its fields are the keys of a recipe: [recipe.md](recipe.md)."}
BESIDE = {
    "LoadedCheckpoint": "moefoundry.pretrained.LoadedCheckpoint",
    "UserError": "moefoundry.config.errors.UserError",
}
"""What the functions give back and raise."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, API, content=api_page()))
    files.append(File.generated(config, COMMANDS, content="\n".join(commands_page())))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave the names that docstrings refer to without Sphinx's roles."""
    return ROLE.sub("<code>", html) if page.file.src_uri == API else html


def api_page() -> str:
    """The page of what ``moefoundry`` exports, as blocks for mkdocstrings."""
    parts = ["# Python API: reference", "[python.md](python.md) has an example, which a test runs."]
    places = {name: f"{module}.{name}" for name, module in moefoundry._MODULES.items()}
    for name, place in (places | BESIDE).items():
        elsewhere = WITHOUT_MEMBERS.get(name)
        parts.append(f"::: {place}" + ("\n    options: {members: false, show_signature: false}" if elsewhere else ""))
        parts += [elsewhere] if elsewhere else []
    return "\n\n".join(parts) + "\n"


def commands_page() -> Iterator[str]:
    """Lines of the page of all commands, with what their ``--help`` prints."""
    yield "# Command line: reference"
    yield "\nWhat `moefoundry COMMAND --help` prints. [training.md](training.md#when-something-is-wrong) has errors.\n"
    with context_of(commands, None, "moefoundry") as context:
        for name in commands.list_commands(context):
            yield from command_section(commands, name, context)


def command_section(group: click.Group, name: str, above: click.Context) -> Iterator[str]:
    """Lines about a command, and about those below it."""
    command = group.get_command(above, name)
    assert command is not None, name
    with context_of(command, above, name) as context:
        depth = len(context.command_path.split())
        yield f"{'#' * depth} {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
        if isinstance(command, click.Group):
            for each in command.list_commands(context):
                yield from command_section(command, each, context)


def context_of(command: click.Command, above: click.Context | None, name: str) -> click.Context:
    settings = command.context_settings | {"terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, above, name, **settings)
