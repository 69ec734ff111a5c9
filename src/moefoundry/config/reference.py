"""``docs/recipe.md``, written from the schema: ``python -m moefoundry.config.reference docs/recipe.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moefoundry.config.parts import TABLES
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_tasks import BenchmarkConfig, CategoryConfig, GauntletConfig
from moefoundry.config.spec import ANY_NAME, Spec, describe, elsewhere, every_key, is_free_on_resume, plain, show, specs
from moefoundry.registry import Part

HEADER = """\
# Recipe reference

Every key of a recipe; `moefoundry explain KEY` says the same of one, or of the name that another project has for it.
This page is written from the schema by
`python -m moefoundry.config.reference docs/recipe.md`; do not edit it by hand.

- **Required** keys have no default: they depend on the model, the data and the machine. The page says what is
  customary, and so does the error where one is missing. `moefoundry init` writes a recipe that has all of them.
- `extends: other.yaml` at the top of a file, relative to that file, takes every key that the file does not have from
  the other, which may extend a third. Mappings are merged, a list is replaced, null turns off; interpolations
  are resolved at the end. `moefoundry validate --show RECIPE` prints every value and where it comes from.
- Overrides on the command line are dotted: `model.moe.top_k=4`, `optimizer.betas=[0.9,0.99]`, `loggers.wandb={}` (turns
  an optional mapping on with its defaults), `eval_loader=null` (turns it off). A list is set whole.
- The value of an override is what stands after the first `=`. Of a key whose type is string or name it is that text as
  it stands: `run_name=1`, `callbacks.report.prompt=# a: b`; nothing, or `null`, is null, and quotes around all of it
  are YAML's. Of any other key it is YAML, without a comment.
- `~` at the beginning of a path is the home directory, in the file and in overrides (a `~` alone is YAML's null).
- `${key}` stands for another key's value, `${oc.env:NAME}` for an environment variable (not one named like a secret).
- Unknown keys, wrong types and values out of range are errors, all listed at once with exit status 2;
  `moefoundry validate RECIPE key=value ...` does just that.
- What a run that goes on with `autoresume` may change is marked in the column "on resume"; another value of any other
  key is another run.
- Plain words are strings: only `true` and `false` are booleans, and a number in quotes is a string.
"""

NAMES_ELSEWHERE = """\
## Names elsewhere

What LLM Foundry, Composer, Hugging Face, torchtitan and Megatron call these keys. The loader refuses the names and says
this.

"""


def reference() -> str:
    """Write the page as Markdown, with a table for each mapping; a mapping with variants has one for each of them."""
    return "\n".join([HEADER, *_sections(Recipe(), "", "Top level"), *_tasks(), _names_elsewhere()])


def _tasks() -> Iterator[str]:
    """Yield the tables of what stands in the lists and mappings that the schema leaves open."""
    for name, part in TABLES["icl_task_types"].listed.items():
        if isinstance(part, Part) and part.config is not None:
            yield from _sections(part.config(), "icl_tasks.", f"A task of `icl_tasks` with `icl_task_type: {name}`")
    yield from _sections(GauntletConfig(), "eval_gauntlet.", "`eval_gauntlet`")
    yield from _sections(CategoryConfig(), "eval_gauntlet.categories.", "A category of `eval_gauntlet.categories`")
    yield from _sections(BenchmarkConfig(), "eval_gauntlet.categories.benchmarks.", "A benchmark of a category")


def _sections(default: Any, path: str, title: str) -> Iterator[str]:
    yield f"## {title}\n"
    nested, rows = [], ["| key | type | default | allowed | on resume | meaning |", "|---|---|---|---|---|---|"]
    for name, spec in specs(type(default)).items():
        value = getattr(default, name)
        full = f"{path}{name}"
        resume = "may change" if is_free_on_resume(full) else ""
        meaning = f"{spec.doc} Customary: {spec.customary}." if spec.customary else spec.doc
        cells = (f"`{full}`", type_of(spec), default_of(spec, value), allowed_of(spec), resume, _cell(meaning))
        rows.append(f"| {' | '.join(cells)} |")
        if spec.is_mapping:
            variants = spec.variants or {"": type(value) if value is not None else spec.kind}
            for tag, cls in variants.items():
                heading = f"`{full}`" + (f" with `{spec.tag}: {tag}`" if tag else "")
                nested.append((value if type(value) is cls else cls(), f"{full}.", heading))
        if spec.entry:
            nested.append((spec.entry(), f"{full}.{ANY_NAME}.", f"`{full}.{ANY_NAME}`"))
    yield "\n".join([*rows, ""]) if len(rows) > 2 else "No keys: write `{}`.\n"
    if (table := TABLES.get(path.rstrip("."))) is not None:
        others = ", ".join(f"`{name}`" for name in table.listed if name not in specs(type(default)))
        named = f"also, by the arguments of Composer's classes: {others}; and " if others else "also "
        yield f"Keys are {named}the names of parts that [installed packages](extending.md) add.\n"
    for child in nested:
        yield from _sections(*child)


def _names_elsewhere() -> str:
    rows = []
    for name, other in sorted(elsewhere().items(), key=lambda item: item[0].lower()):
        if name not in every_key():
            rows.append(f"| `{name}` | {' or '.join(f'`{key}`' for key in other.keys) or _cell(other.advice)} |")
    return NAMES_ELSEWHERE + "\n".join(["| name | here |", "|---|---|", *rows]) + "\n"


def type_of(spec: Spec) -> str:
    """Name the type of a key's value."""
    names = {int: "integer", float: "number", str: "string", bool: "boolean", object: "value"}
    if spec.is_mapping or spec.entry:
        name = "mapping" if spec.is_mapping else "mappings by name"
    elif spec.table is not None:
        name = "name"
    else:
        name = f"list of {names.get(spec.item, 'name')}s" if spec.item else names.get(spec.kind, "name")
    name = " or ".join([name, *(f"`{word}`" for word in spec.words or ())])
    return f"{name} or null" if spec.optional else name


def default_of(spec: Spec, value: Any) -> str:
    """Show a key's default, as Markdown."""
    if spec.required:
        return "**required**"
    if spec.is_mapping and value is not None:
        return "see below"
    value = plain(value)
    text = f"[{', '.join(show(item) for item in value)}]" if isinstance(value, list) else show(value)
    return _cell(f"`{text}`")


def allowed_of(spec: Spec) -> str:
    """Say which values a key may have, as Markdown; nothing where its type says so."""
    if spec.available is not None:
        values = ", ".join(f"`{show(plain(value))}`" for value in spec.available)
        return f"{values} in this release"
    if spec.variants:
        return f"`{spec.tag}`: " + ", ".join(f"`{tag}`" for tag in spec.variants)
    plain_type = (
        spec.is_mapping
        or spec.entry
        or not (spec.bounds or spec.pattern or spec.length or type_of(spec).startswith("name"))
    )
    return "" if plain_type else _cell(describe(spec))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())
