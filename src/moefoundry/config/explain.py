"""Explanation of one key: its meaning, type, default, allowed values, names elsewhere, and rules on resume."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.config.field import REQUIRED
from moefoundry.config.reference import allowed_of, default_of, type_of
from moefoundry.config.schema import Recipe
from moefoundry.config.spec import ANY_NAME, Spec, elsewhere, every_key, find_key, is_free_on_resume, plain, specs


def explain(name: str) -> str:
    """Explain the key of a dotted path, a key's last name, or a name that another project has for it.

    Raises:
        UserError: There is no such key.
    """
    if name in every_key() or find_key(name) is not None:
        return "\n".join(_explained(name))
    if found := [path for path in every_key() if path.endswith(f".{name}")]:
        return "\n\n".join("\n".join(_explained(path)) for path in found)
    other = elsewhere().get(name.rpartition(".")[2])
    if other is not None and not other.keys:
        return f"{name}: a name of other projects. {other.advice}"
    if other is not None:
        return "\n\n".join(
            "\n".join([f"{name}: a name of other projects for {path}", *_explained(path)]) for path in other.keys
        )
    known = dict.fromkeys([*every_key(), *(path.rpartition(".")[2] for path in every_key())])
    near = difflib.get_close_matches(name.lower(), known, 3, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/recipe.md lists all keys"
    raise UserError(f"{name}: no key of a recipe; {hint}")


def _explained(path: str) -> Iterator[str]:
    """Yield the lines about a key, then the keys below it."""
    spec = every_key().get(path) or find_key(path)
    assert spec is not None  # the caller has looked
    default = default_of(spec, _default(path)).replace("`", "").replace("**", "")
    yield f"{path}: {type_of(spec)}" + {"see below": "", "required": ", required"}.get(default, f", default {default}")
    yield f"  {spec.doc}"
    if allowed := allowed_of(spec).replace("`", "").replace("\\|", "|"):
        yield f"  allowed: {allowed}"
    if spec.customary:
        yield f"  customary: {spec.customary}"
    yield "  on resume: may change" if is_free_on_resume(path) else "  on resume: another value is another run"
    if spec.renamed_from:
        yield f"  elsewhere: {', '.join(spec.renamed_from)}"
    for old, new in spec.other_values.items():
        yield f"  elsewhere {old} is {new} here"
    prefix = f"{path}.{ANY_NAME}." if spec.entry else f"{path}."
    for child, below in every_key().items():
        if child.startswith(prefix) and "." not in (name := child.removeprefix(prefix)):
            yield f"    {f'{ANY_NAME}.{name}' if spec.entry else name}: {_first_sentence(below)}"


def _first_sentence(spec: Spec) -> str:
    return spec.doc.partition(". ")[0].rstrip(".")


def _default(path: str) -> Any:
    """Find the default of a key: that of a recipe without it, or of the first variant that has it."""
    value: Any = Recipe()
    spec: Spec | None = None
    for name in path.split("."):
        if spec is not None and spec.variants and name not in specs(type(value)):
            value = next((cls() for cls in spec.variants.values() if name in specs(cls)), None)
        if value is None or name not in specs(type(value)):
            return None
        spec, value = specs(type(value))[name], getattr(value, name)
        if value is None and spec.is_mapping and name != path.rpartition(".")[2]:
            value = spec.kind()
    return None if value is REQUIRED else plain(value)
