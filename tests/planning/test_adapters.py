"""Plans of recipes that train adapters count what a rank then holds."""

import re
import shlex
from typing import NamedTuple

from moefoundry.config import Recipe, load_recipe
from moefoundry.planning.plan import make_plan
from moefoundry.planning.table import GIB
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed

SMALL = (
    *("model.vocab_size=67", "model.d_model=32", "model.n_layers=2", "model.ffn_hidden_size=48", "max_seq_len=16"),
    *("model.moe.expert_hidden_size=16", "model.moe.num_experts=6", "load_path=base", "precision.compute=bf16"),
    *("lora={rank: 8, targets: [attention, experts.up_proj], train_router: true}", "mesh={shard: 2, expert: 2}"),
)

ROOT = QUICKSTART.parents[1]


class Held(NamedTuple):
    """Bytes of this rank, without what FSDP adds to make shards even."""

    parameters: int
    gradients: int
    moments: int


def held(recipe: Recipe) -> Held:
    """Train one step."""
    import torch

    from moefoundry.adapters import apply_lora
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import meta_model
    from moefoundry.optim import build_adamw
    from moefoundry.parallel import materialize, parallelize

    assert recipe.lora is not None
    model = meta_model(recipe.model)
    apply_lora(model, recipe.lora)
    meshes = build_meshes(resolve_degrees(recipe.mesh, 2), "cpu")
    parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
    materialize(model, "cpu", 1)
    optimizer = build_adamw(model, recipe.optimizer)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    model(tokens, tokens).total.backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [slots[name] for slots in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    sizes = [sum(t.to_local().nbytes for t in tensors) for tensors in (list(model.parameters()), gradients, moments)]
    return Held(*sizes)


def test_memory_of_a_rank_is_as_planned() -> None:
    recipe = load_recipe(QUICKSTART, list(SMALL), 2)
    memory = make_plan(recipe, 2).memory
    most = max(run_distributed(held, 2, recipe), key=lambda rank: rank.moments)
    assert memory.optimizer == most.moments > 0
    assert most.gradients <= memory.gradients <= 1.05 * most.gradients  # shards of odd sizes are padded
    assert most.parameters <= memory.parameters <= 1.05 * most.parameters
    assert memory.gradients < 0.5 * memory.parameters


def test_only_gradients_of_adapters_are_reduced() -> None:
    recipe = load_recipe(QUICKSTART, list(SMALL), 2)
    planned = make_plan(recipe, 2)
    recipe.lora = None
    whole = make_plan(recipe, 2)
    counts = planned.parameters
    assert str(counts).endswith("trained")
    routers = 6 * 32
    assert counts.total - counts.frozen < 0.5 * counts.frozen == 0.5 * (whole.parameters.total - routers)
    reduced, of_all = (
        sum(entry.sent for entry in plan.traffic if entry.collective == "reduce_scatter") for plan in (planned, whole)
    )
    assert 0 < reduced < 0.5 * of_all
    assert planned.memory.peak.total < whole.memory.peak.total


def test_the_table_of_the_page_is_what_plan_says() -> None:
    text = (ROOT / "docs/lora.md").read_text()
    text = text.replace("| the same |", "| `configs/finetune/olmoe-1b-7b-lora.yaml` |")
    rows = re.findall(r"^\| `(configs/.*)` \| (\d+) \| (\d+) GiB \| (\d+)M of ([\d.]+)B \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for path, devices, gib, millions, billions in rows:
        plan = make_plan(load_recipe(ROOT / path, [], int(devices)), int(devices))
        trained = plan.parameters.total - plan.parameters.frozen
        assert f"{plan.memory.total / GIB:.0f}" == gib
        assert (f"{trained / 1e6:.0f}", f"{plan.parameters.total / 1e9:.1f}") == (millions, billions)


def test_the_commands_of_the_page_make_what_its_recipe_reads() -> None:
    (block,) = re.findall(
        r"```bash\n(moefoundry convert import OLMOE.*?)```", (ROOT / "docs/lora.md").read_text(), re.DOTALL
    )
    imported, prepared, trained, merged = (shlex.split(line) for line in block.splitlines())
    recipe = load_recipe(ROOT / trained[-1])
    assert imported[-1] == recipe.load_path
    assert prepared[3] == recipe.train_loader.dataset.local
    assert prepared[prepared.index("--tokenizer") + 1] == f"{imported[-1]}/tokenizer"
    assert prepared[-1] == str(recipe.max_seq_len)
    assert merged[3] == recipe.run_dir
