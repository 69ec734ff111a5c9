"""``${...}`` in a recipe, resolved by OmegaConf; each failure names the key where it stands.

Allowed: ``${key}``, ``${.sibling}``, and the resolvers ``${oc.env:NAME}`` (for paths that differ between machines; it
gives a string) and ``${oc.decode:...}`` (turns one into a number). A variable named like a secret is refused: a run
keeps its resolved recipe on disk.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moefoundry.config.errors import Problem
from moefoundry.config.spec import INVALID, join, looks_secret, show

_RESOLVERS = ("oc.env", "oc.decode")


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
        if not self.references:  # as in a resolved recipe that is read back: OmegaConf would take most of the time
            return screened
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


def _refused(value: str) -> str:
    """Say why an interpolation is not allowed; return "" if it is."""
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
