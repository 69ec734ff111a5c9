"""Check: balance losses are what they are defined to be, once, however the batch is cut and whatever is recomputed.

The losses of a batch are computed a second time here, in float64, from what the routers give, by the definition in
``docs/routing.md``. So a loss that is counted twice is found, also where every way to compute the batch does so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moefoundry.config import ActivationCheckpointing, AuxLossScope, MeshConfig, Recipe
from moefoundry.moe.router import Routing
from moefoundry.parallel import moe_layers
from moefoundry.verify.ranks import World
from moefoundry.verify.result import Difference, Result, difference, relative, within
from moefoundry.verify.steps import Step, batch, build, counted, train
from moefoundry.verify.twin import ROWS, Twin, exact

VALUE_BOUND, GRADIENT_BOUND, LOSS_BOUND = 1e-5, 1e-4, 1e-6
"""Relative: an fp32 sum of a few hundred tokens against float64; its gradient; two fp32 sums in another order."""
TOTAL_BOUND = 1e-5
"""Relative to the total, in which balance losses are a small share."""
ALONE = MeshConfig(1, 1, 1)


def check(twin: Twin) -> Iterator[Result]:
    """Compare balance losses with their definition, then ways to compute a batch with each other."""
    recipe = replace(exact(twin.recipe), mesh=ALONE)
    with World(by_definition, recipe, ranks=1, room=twin.room, gpu=twin.gpu) as world:
        results: list[Result] = world.results()[0]
        yield from results
    sizes, reason = micro_batches(recipe)
    ways = [(sizes[0], mode) for mode in ActivationCheckpointing] + [
        (size, mode) for size in sizes[1:] for mode in (ActivationCheckpointing.none, ActivationCheckpointing.full)
    ]
    with World(in_ways, recipe, ways, ranks=1, room=twin.room, gpu=twin.gpu) as world:
        steps: list[Step] = world.results()[0]
    yield same_losses(steps, ways, "recomputation" if reason else "micro-batches or recomputation")
    yield same_gradients(steps, ways)
    if reason:
        yield Result("neither depends on micro-batches", None, detail=f"not tried: {reason}")


def micro_batches(recipe: Recipe) -> tuple[list[int], str]:
    """List sizes of micro-batches that must not matter, and say why there is only one, where that is so."""
    scope, capacity = recipe.model.moe.balance.aux_loss_scope, recipe.model.moe.capacity_factor
    if scope != AuxLossScope.sequence:
        return [ROWS], f"aux_loss_scope {scope} depends on the micro-batch by definition"
    if capacity is not None:
        return [ROWS], "a capacity depends on the micro-batch by definition"
    return [1, 3, ROWS], ""


def in_ways(recipe: Recipe, ways: Sequence[tuple[int, ActivationCheckpointing]]) -> list[Step]:
    """Compute a step in several ways."""
    return [
        train(replace(recipe, device_train_microbatch_size=size, activation_checkpointing=mode), 1)[0]
        for size, mode in ways
    ]


def named(way: tuple[int, ActivationCheckpointing]) -> str:
    """Name a way to compute a step."""
    return f"micro-batches of {way[0]}, activation_checkpointing {way[1]}"


def same_losses(steps: list[Step], ways: list[tuple[int, ActivationCheckpointing]], of: str) -> Result:
    """Compare all losses of all ways with those of the first; ``of`` says in what the ways differ."""
    worst, where = Difference("loss total", 0.0, 0.0), ""
    floor = LOSS_BOUND * steps[0].losses["total"].abs().item()
    for way, step in zip(ways, steps, strict=True):
        for name, loss in steps[0].losses.items():
            size = relative(step.losses[name], loss, floor)
            if size > worst.worst:
                worst, where = Difference(f"loss {name}", size, size), named(way)
    return within(f"losses do not depend on {of}", worst, LOSS_BOUND, f"{len(ways)} ways", where)


def same_gradients(steps: list[Step], ways: list[tuple[int, ActivationCheckpointing]]) -> Result:
    """Compare all gradients of all ways with those of the first."""
    worst, where = Difference("none", 0.0, 0.0), ""
    for way, step in zip(ways, steps, strict=True):
        size = difference(step.gradients, steps[0].gradients, GRADIENT_BOUND)
        if size.worst > worst.worst:
            worst, where = size, named(way)
    return within("nor do gradients", worst, GRADIENT_BOUND, f"{len(steps[0].gradients)} tensors", where)


def by_definition(recipe: Recipe) -> list[Result]:
    """Compare the balance and z-losses of a batch, and what they add to the total and to the gates' gradients."""
    balance = recipe.model.moe.balance
    wrapper = build(replace(recipe, activation_checkpointing=ActivationCheckpointing.none))
    model = wrapper.model
    layers = moe_layers(model)
    if not layers or not (balance.aux_loss_weight or balance.z_loss_weight):
        reason = "no block has experts" if not layers else "aux_loss_weight and z_loss_weight are 0"
        return [Result("balance losses are what they are defined to be", None, detail=reason)]
    routings: list[Routing] = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _module, _inputs, routing: routings.append(routing))
    rows = batch(recipe, padded=False)
    part = counted({name: values for name, values in rows.items() if _is_needed(name, recipe)}, recipe, _place(model))
    if model.step_counts is not None:
        model.step_counts.begin_step()
    outputs = wrapper(part)
    losses = wrapper.loss(outputs, part)
    scope = balance.aux_loss_scope
    expected_balance = balance.aux_loss_weight * _sum([expected(each, scope) for each in routings])
    expected_z = balance.z_loss_weight * _sum(
        [each.router_logits.double().logsumexp(dim=-1).square().mean() for each in routings]
    )
    rest = [value for name, value in losses.items() if name not in ("total", "balance", "z", "lm")]
    added = losses["total"] - _sum(rest) - (0.0 if "dpo" in losses else losses["lm"])
    claim = "balance and z-loss are what they are defined to be"
    values = {"balance": (losses["balance"], expected_balance), "z": (losses["z"], expected_z)}
    sizes = {name: relative(got.detach(), wanted.detach()) for name, (got, wanted) in values.items()}
    name = max(sizes, key=sizes.__getitem__)
    size, wanted = sizes[name], expected_balance + expected_z
    told = ", ".join(f"{each} {got.item():.4g}" for each, (got, _) in values.items())
    off = f"loss {name}: {values[name][0].item():.6g}, and by definition {values[name][1].item():.6g}"
    counted_once = abs(added.item() - wanted.item()) / max(1e-12, abs(losses["total"].item()))
    total = f"the total has {added.item():.6g} of them, and they are {wanted.item():.6g}"
    gates = {f"{path}.weight": module.weight for path, module in model.named_modules() if path.endswith("router.gate")}
    return [
        Result(claim, size <= VALUE_BOUND, size, VALUE_BOUND, told if size <= VALUE_BOUND else off),
        Result("the total has them once", counted_once <= TOTAL_BOUND, counted_once, TOTAL_BOUND, total),
        _gradients(losses["balance"] + losses["z"], wanted, gates),
    ]


def expected(routing: Routing, scope: AuxLossScope) -> Tensor:
    """Compute the balance loss of a layer by its definition, in float64: the sum over experts of load times score."""
    scores_TE = routing.scores.double()
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, routing.topk_expert_ids, 1.0)
    segments = ROWS if scope == AuxLossScope.sequence else 1
    values = []
    for probs_SE, chosen_SE in zip(probs_TE.chunk(segments), chosen_TE.chunk(segments), strict=True):
        load_E = chosen_SE.sum(dim=0) * chosen_SE.shape[1] / chosen_SE.sum()
        values.append((load_E * probs_SE.mean(dim=0)).sum())
    return torch.stack(values).mean()


def _gradients(got: Tensor, wanted: Tensor, gates: dict[str, Tensor]) -> Result:
    claim = "so are their gradients at the gates"
    trained = {name: weight for name, weight in gates.items() if weight.requires_grad}
    if not trained:
        return Result(claim, None, detail="routers are frozen")
    mine, theirs = (
        dict(zip(trained, torch.autograd.grad(loss, [*trained.values()], retain_graph=True), strict=True))
        for loss in (got, wanted)
    )
    found = difference(mine, theirs, GRADIENT_BOUND)
    return within(claim, found, GRADIENT_BOUND, f"{len(trained)} gates")


def _is_needed(name: str, recipe: Recipe) -> bool:
    return name != "sequence_id" or recipe.model.document_masking


def _place(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).sum() if values else torch.zeros((), dtype=torch.float64)
