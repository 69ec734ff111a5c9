"""``moefoundry explain``: meaning of a key of a recipe."""

from __future__ import annotations

import click


@click.command("explain")
@click.argument("key")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE] [KEY=VALUE]...")
def command(key: str, arguments: tuple[str, ...]) -> None:
    """Say what KEY means, which values it may have, its default, and what others call it.

    KEY is a dotted path (model.moe.top_k), its last name (top_k), or a name of another project (num_experts_per_tok).
    With a RECIPE, also its value there, and where that comes from.
    """
    from moefoundry.config.explain import explain

    print(explain(key))
    if arguments:
        print(_in_recipe(key, list(arguments)))


def _in_recipe(key: str, arguments: list[str]) -> str:
    """Give the lines of ``validate --show`` that speak of the key."""
    from moefoundry.config import load_layers, recipe_of, split_arguments
    from moefoundry.config.dump import flatten, origins
    from moefoundry.config.spec import show_leaf

    path, overrides = split_arguments(arguments)
    layers = load_layers(path, overrides)
    recipe = recipe_of(layers, None)
    found = origins(recipe, layers)
    names = [name for name in flatten(recipe) if name == key or name.startswith(f"{key}.") or name.endswith(f".{key}")]
    lines = [f"  {name}: {show_leaf(flatten(recipe)[name])}  ({found.get(name, 'default')})" for name in names]
    return "\n".join(["", f"in {path}:", *(lines or ["  it is not in this recipe"])])
