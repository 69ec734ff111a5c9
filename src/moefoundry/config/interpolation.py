"""``${...}`` in a recipe, resolved by OmegaConf; each failure names the key where it stands.

Allowed: ``${key}``, ``${.sibling}``, and the resolvers ``${oc.env:NAME}`` (for paths that differ between machines; it
gives a string) and ``${oc.decode:...}`` (turns one into a number). A variable named like a secret is refused: a run
keeps its resolved recipe on disk.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moefoundry.config.errors import Problem
from moefoundry.config.secrets import looks_secret
from moefoundry.config.spec import INVALID, join, show

_RESOLVERS = ("oc.env", "oc.decode")
_KEY = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


class Resolver:
    """Resolves one tree.

    Attributes:
        problems: Path -> the fault of the interpolation there, whose value becomes ``INVALID``.
        references: Path -> the keys that its value refers to.
    """

    def __init__(self) -> None:
        self.problems: dict[str, Problem] = {}
        self.references: dict[str, list[str]] = {}

    def resolve(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Copy ``tree`` (dicts, lists, scalars) and resolve its interpolations."""
        screened = self._screen(tree, "")
        if not self.references:
            return screened
        if not self.problems:
            try:
                result: dict[str, Any] = _directly(screened, screened, ())
                return result
            except LookupError:
                pass  # OmegaConf resolves it, or words the problem
        return self._resolve(OmegaConf.create(screened), "", ())

    def _screen(self, value: Any, path: str) -> Any:
        """Take out the interpolations that OmegaConf cannot hold or must not evaluate."""
        if isinstance(value, dict):
            return {name: self._screen(child, join(path, name)) for name, child in value.items()}
        if isinstance(value, list):
            return [self._screen(child, join(path, index)) for index, child in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            self.references[path] = re.findall(r"\$\{([\w.]+)\}", value)
            reason = _refused(value)
            if reason:
                self.problems[path] = Problem(path, f"{show(value)}: {reason}")
                return None
        return value

    def _resolve(self, node: Any, path: str, ancestors: tuple[int, ...]) -> Any:
        if not OmegaConf.is_config(node):
            return node
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        values = {key: self._child(node, key, join(path, key), (*ancestors, id(node))) for key in keys}
        return values if isinstance(node, DictConfig) else list(values.values())

    def _child(self, node: Any, key: Any, path: str, ancestors: tuple[int, ...]) -> Any:
        if path in self.problems:
            return INVALID
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index]
            reason = str(error).splitlines()[0]
            self.problems[path] = Problem(path, f"cannot resolve {show(raw)}: {reason}")
            if reason.startswith("Recursive"):  # no key of a cycle is the culprit behind the others
                self.references.pop(path, None)
            return INVALID
        if id(value) in ancestors:
            self.problems[path] = Problem(path, "an interpolation that contains itself")
            return INVALID
        if isinstance(value, str) and "${" in value:
            self.problems[path] = Problem(path, f"{show(value)}: a literal '${{' is not supported")
            return INVALID
        return self._resolve(value, path, ancestors)


def _directly(value: Any, tree: dict[str, Any], above: tuple[str, ...]) -> Any:
    """Resolve the interpolations of ``value`` without OmegaConf, which would take most of the time of loading a recipe.

    Each must be a ``${key}`` of ``tree`` that holds a text, or be the whole value and name any scalar: nearly all are.
    OmegaConf gives the same.

    Raises:
        LookupError: One is something else.
    """
    if isinstance(value, dict):
        return {name: _directly(child, tree, above) for name, child in value.items()}
    if isinstance(value, list):
        return [_directly(child, tree, above) for child in value]
    if not isinstance(value, str) or ("${" not in value and value != "???"):
        return value
    if value in above or value == "???" or "\\" in value or "${" in _KEY.sub("", value):
        raise LookupError
    targets = {name: _directly(_scalar_at(tree, name), tree, (*above, value)) for name in _KEY.findall(value)}
    if _KEY.fullmatch(value):
        return targets[value[2:-1]]
    if not all(isinstance(target, str) for target in targets.values()):
        raise LookupError
    return _KEY.sub(lambda match: targets[match[1]], value)


def _scalar_at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            raise LookupError
        tree = tree[name]
    if isinstance(tree, (dict, list)):
        raise LookupError
    return tree


@cache
def _refused(value: str) -> str:
    """Say why an interpolation is not allowed; return "" if it is."""
    if _KEY.fullmatch(value):
        return ""
    try:
        OmegaConf.create([value])
    except OmegaConfBaseException as error:
        return f"not an interpolation ({str(error).splitlines()[0]})"
    for resolver, argument in re.findall(r"\$\{\s*([^\s{}:]+)\s*:([^,}]*)", value):
        if resolver not in _RESOLVERS:
            return f"resolver {resolver!r} is refused (allowed: {', '.join(_RESOLVERS)})"
        if resolver == "oc.env" and looks_secret(argument):
            return "a variable named like a secret must not enter a recipe, which is kept on disk"
    return ""
