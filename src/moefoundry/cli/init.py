"""``moefoundry init``: a commented recipe to start from. Heavy imports happen when it runs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import click

from moefoundry.cli.arguments import local_path, positive

UNITS = {"": 1, "M": 10**6, "B": 10**9, "T": 10**12}


def _count(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([MBT]?)", text)
    if not match or not (count := int(float(match[1]) * UNITS[match[2]])):
        raise click.BadParameter(f"{text!r} is no number of parameters; write one such as 600M or 3B")
    return count


@click.command("init")
@click.option("--family", metavar="F", help="A model_type, such as olmoe, qwen3_moe or deepseek_v3.")
@click.option("--from", "hf", type=local_path, metavar="HF_DIR", help="A directory with config.json.")
@click.option("--active", type=_count, metavar="N", help="Parameters that a token meets, such as 600M.")
@click.option("--total", type=_count, metavar="N", help="All parameters, with --active; such as 3B.")
@click.option("--vocab-size", type=positive, default="50304", metavar="V", help="With --active (default 50304).")
@click.option("-o", "--output", type=local_path, metavar="FILE", help="File to write (default: standard output).")
def command(
    family: str | None, hf: Path | None, active: int | None, total: int | None, vocab_size: int, output: Path | None
) -> None:
    """Write a commented recipe.

    It is that of a family's published model, of the config.json in a Hugging Face directory, or of a model of about so
    many parameters. Rate, batch, length and warm-up follow from the active parameters, by rules that the comments
    state. An existing file is never replaced.
    """
    from moefoundry.config.errors import UserError

    if sum(source is not None for source in (family, hf, active)) != 1:
        raise click.UsageError("give one of --family F, --from HF_DIR, or --active N with --total N")
    if (active is None) != (total is None):
        raise click.UsageError("a size is --active N and --total N together")
    text = _recipe(family, hf, active, total, vocab_size)
    if output is None:
        print(text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    print(f"{output}: check it with: moefoundry validate {output}")


def _recipe(family: str | None, hf: Path | None, active: int | None, total: int | None, vocab_size: int) -> str:
    from moefoundry.config.errors import UserError
    from moefoundry.conversion.families import FAMILIES, family_of
    from moefoundry.conversion.hf_directory import read_hf_config
    from moefoundry.conversion.starting_recipe import recipe_of_config, recipe_of_family, recipe_of_size

    if active is not None and total is not None:
        return recipe_of_size(active, total, vocab_size)
    if hf is not None:
        config = read_hf_config(hf)
        return recipe_of_config(family_of(config), config, hf.resolve().name)
    if family is None or family not in FAMILIES:
        near = difflib.get_close_matches(family or "", FAMILIES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--family: no model family {family!r}; there are {', '.join(sorted(FAMILIES))}{hint}")
    return recipe_of_family(FAMILIES[family])
