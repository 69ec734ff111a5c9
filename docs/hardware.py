"""Write ``configs/hardware/`` and the tables of ``docs/hardware.md``: published recipes on 8, 64, 512 and 2048 H100.

    python docs/hardware.py            the tables, from the files that are there
    python docs/hardware.py --search [RECIPE...]   first the files of these, or of all (seconds each)

Mesh, when it gathers and reduces, micro-batch and checkpointing are those that ``moefoundry recommend`` finds, in BF16
and in FP8, for the recipe's own number of chunks of an exchange.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moefoundry.config import Gather, Recipe, Reduce, load_recipe
from moefoundry.planning.choose import HEADROOM, Candidate, choose
from moefoundry.planning.devices import accelerator
from moefoundry.planning.estimate import Estimate, estimate
from moefoundry.planning.table import GIB

ROOT = Path(__file__).parents[1]
PUBLISHED, HARDWARE = ROOT / "configs/pretrain", ROOT / "configs/hardware"
PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- begin: python docs/hardware.py -->\n", "<!-- end -->\n"
USES = (
    ("pretraining", "hardware/qwen3-30b-a3b-64xh100-bf16", 64, ()),
    ("continued training", "hardware/qwen3-30b-a3b-64xh100-bf16", 64, ("load_path=imported", "load_weights_only=true")),
    ("upcycling", "hardware/qwen1.5-moe-14b-64xh100-bf16", 64, ("load_path=upcycled", "load_weights_only=true")),
    ("finetuning", "finetune/finetune-olmoe-1b-7b", 8, ()),
    ("preferences", "finetune/dpo-olmoe-1b-7b", 8, ()),
    ("adapters", "finetune/olmoe-1b-7b-lora", 8, ()),
    ("adapters", "finetune/qwen3-30b-a3b-lora", 8, ()),
)
"""Uses of trained weights, each with a recipe, its H100, and overrides."""
DEVICES = (8, 64, 512, 2048)
PRECISIONS = {"bf16": "precision.fp8.recipe=null", "fp8": "precision.fp8.recipe=deepseek_v3"}
H100 = accelerator("h100")
LIMIT = H100.memory_gb * 1e9 * (1 - HEADROOM)
"""Bytes that may be planned for each device."""


@dataclass(frozen=True)
class Case:
    """A published recipe on a number of H100, in one precision."""

    recipe: str
    devices: int
    precision: str

    @property
    def file(self) -> Path:
        """Its file, which is there if it fits."""
        return HARDWARE / f"{self.recipe}-{self.devices}xh100-{self.precision}.yaml"


def cases() -> Iterator[Case]:
    for path in sorted(PUBLISHED.glob("*.yaml")):
        for devices in DEVICES:
            for precision in PRECISIONS:
                yield Case(path.stem, devices, precision)


def search(case: Case) -> Candidate | None:
    """Find the fastest that fits; None where nothing does, or the recipe cannot be trained in this precision."""
    overrides = ["precision.compute=bf16", PRECISIONS[case.precision]]
    recipe = load_recipe(str(PUBLISHED / f"{case.recipe}.yaml"), overrides)
    best = choose(recipe, case.devices, H100, 1, keep_precision=True, chunks=()).best
    return best[0] if best else None


def text_of(case: Case, found: Candidate) -> str:
    """Write the file of a case."""
    mesh, recipe = found.estimate.plan.mesh, case.recipe
    fp8 = "{recipe: deepseek_v3}" if case.precision == "fp8" else "{recipe: null}"
    plan = found.estimate.plan
    once = {"gather": mesh.gather == Gather.each_step, "reduce": mesh.reduce == Reduce.each_step}
    times = "".join(f", {key}: each_step" for key, chosen in once.items() if chosen)
    return (
        f"# {recipe} on {case.devices} H100 in {case.precision.upper()}, as `moefoundry recommend` found it: "
        "docs/hardware.md\n"
        f"extends: ../pretrain/{recipe}.yaml\n"
        f"run_name: {case.file.stem}\n"
        f"mesh: {{replicate: {mesh.replicate}, shard: {mesh.shard}, expert: {mesh.expert}{times}}}\n"
        f"precision: {{compute: bf16, fp8: {fp8}}}\n"
        f"activation_checkpointing: {found.changes.get('activation_checkpointing', own_checkpointing(recipe))}\n"
        f"device_train_microbatch_size: {plan.tokens_per_micro_batch // load(recipe).max_seq_len}\n"
    )


def load(recipe: str) -> Recipe:
    return load_recipe(str(PUBLISHED / f"{recipe}.yaml"))


def own_checkpointing(recipe: str) -> str:
    return str(load(recipe).activation_checkpointing)


def row(case: Case) -> str:
    """Write the row of a file's recipe, by its estimate."""
    found: Estimate = estimate(load_recipe(str(case.file), [], case.devices), case.devices, H100)
    plan = found.plan
    mesh = f"{plan.mesh.replicate} x {plan.mesh.shard}, {plan.mesh.expert}"
    mesh += ", gathered once" if plan.mesh.gather == Gather.each_step else ""
    mesh += ", reduced once" if plan.mesh.reduce == Reduce.each_step else ""
    days = "" if found.days is None else f"{found.days:,.1f}"
    link = f"[{case.recipe}](../configs/hardware/{case.file.name})"
    speed = f"{found.tokens_per_second:,.0f} | {found.mfu:.0%} | {plan.memory.total / GIB:.0f} | {days}"
    return f"| {link} | {case.devices} | {case.precision.upper()} | {mesh} | {speed} |"


def uses() -> str:
    """Write the table of uses."""
    rows = ["| use | recipe | overrides | H100 | tokens/s each | MFU | GiB |", "|---|---|---|---|---|---|---|"]
    for use, name, devices, overrides in USES:
        file = ROOT / f"configs/{name}.yaml"
        found = estimate(load_recipe(str(file), list(overrides), devices), devices, H100)
        keys = f"`{' '.join(overrides)}`" if overrides else ""
        figures = f"{found.tokens_per_second:,.0f} | {found.mfu:.0%} | {found.plan.memory.total / GIB:.0f}"
        rows.append(f"| {use} | [{file.stem}](../configs/{name}.yaml) | {keys} | {devices} | {figures} |")
    return "\n".join(rows) + "\n"


def table() -> str:
    """Write the table of all files."""
    rows = [row(case) for case in cases() if case.file.exists()]
    head = "| recipe | H100 | products | replicate x shard, expert | tokens/s each | MFU | GiB | days |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows]) + "\n"


def main() -> None:
    if "--search" in sys.argv:
        wanted = sys.argv[2:] or sorted({case.recipe for case in cases()})
        for case in (case for name in wanted for case in cases() if case.recipe == name):
            case.file.unlink(missing_ok=True)  # of an earlier search, which fits no more
            if (found := search(case)) is not None:
                case.file.write_text(text_of(case, found))
                print(case.file.name, flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{uses()}\n{table()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
