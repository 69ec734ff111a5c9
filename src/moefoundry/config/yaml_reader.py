"""Strict YAML: a recipe means what it says, or it is refused with the line that does not.

PyYAML's own safe loader keeps the last of two equal keys, reads ``6e-4`` as a string, ``yes`` as true, ``010`` as 8
and ``12:30`` as 750, and expands nested aliases without limit. Here plain scalars follow YAML 1.2's core schema (null,
true, false, decimal integers, floats; everything else is a string), equal keys and tags are refused at every depth,
keys are strings, and aliases may not expand to more than :data:`MAX_NODES` nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import yaml

from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.spec import show

MAX_NODES = 10_000
_CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_STRING_KEYS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}
_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
]


class StrictLoader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class TextLoader(yaml.SafeLoader):
    """The safe loader, which takes every plain scalar but null for text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class StrictDumper(yaml.SafeDumper):
    """Quotes every string that :class:`StrictLoader`, or a YAML 1.1 reader, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _cls in (StrictLoader, StrictDumper):
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)
    if _name == "null":
        TextLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)


def parse_yaml(text: str, source: str, *, comments: bool = True, plain_text: bool = False) -> Any:
    """Parse one YAML document into fresh dicts, lists and scalars (aliases are copied, never shared).

    Args:
        text: The document.
        source: Its name in errors: a file, or the override it came from.
        comments: A comment may follow the value.
        plain_text: Plain scalars, such as ``1`` or ``true`` but not null, are text.

    Raises:
        ConfigError: Not YAML, more than one document, a tag, a key given twice, a key that is not a string, or
            aliases that contain themselves or expand too far. Problems have the path ``source:line``.
    """
    return _copied(_parsed(text, source, comments, plain_text))


@lru_cache(maxsize=256)  # commands that compare many recipes read the same few files again and again
def _parsed(text: str, source: str, comments: bool, plain_text: bool) -> Any:
    """Parse as :func:`parse_yaml`; the mappings and lists of an alias are shared."""
    try:
        loader = TextLoader(text) if plain_text else StrictLoader(text)
        node = loader.get_single_node()
        rest = "" if comments else text[node.end_mark.index if node else 0 :].strip()
        problems = [Problem(f"{source}:{line}", *words) for line, *words in sorted(_faults(node))] if node else []
        if rest:
            problems.append(Problem(source, f"YAML takes {show(rest)} for a comment", allowed="quotes around it"))
        if node and not problems and _expanded_size(node, {}) > MAX_NODES:
            problems = [Problem(source, "aliases expand too far", allowed=f"at most {MAX_NODES} nodes")]
        if not problems:
            return loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = " ".join(part for part in (error.problem, error.context) if part)
        problems = [Problem(where, f"not valid YAML: {reason}")]
    except (yaml.YAMLError, ValueError) as error:
        problems = [Problem(source, f"not valid YAML: {str(error).splitlines()[0]}")]
    except RecursionError:
        problems = [Problem(source, "nested too deeply, or an alias that contains itself")]
    raise ConfigError(problems, source)


def _faults(node: yaml.Node) -> Iterator[tuple[int, str, str]]:
    """Yield (line, message, allowed) of tags, repeated keys and keys that are no strings; aliased nodes come once."""
    visited: set[int] = set()
    stack = [(node, "")]
    while stack:
        node, path = stack.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if node.tag not in _CORE_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            yield node.start_mark.line + 1, f"YAML tag {tag!r} is refused", "plain values"
        if isinstance(node, yaml.SequenceNode):
            stack += [(child, f"{path}[{index}]") for index, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for name, value in node.value:
                line = name.start_mark.line + 1
                if not isinstance(name, yaml.ScalarNode) or name.tag not in _STRING_KEYS:
                    yield line, "a key that is not a string", "string keys"
                    continue
                full = f"{path}.{name.value}" if path else name.value
                if name.value in first:
                    yield line, f"key {full!r} is given twice (first on line {first[name.value]})", ""
                first.setdefault(name.value, line)
                stack.append((value, full))


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count nodes after every alias is written out, in linear time. An alias inside itself ends in RecursionError."""
    if id(node) not in sizes:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _copied(value: Any) -> Any:
    """Copy every mapping and list, so that those of an alias are not shared."""
    if isinstance(value, dict):
        return {name: _copied(child) for name, child in value.items()}
    return [_copied(child) for child in value] if isinstance(value, list) else value
