"""Check: a Hugging Face round trip gives back every tensor, and transformers computes what the model computes.

Values are drawn so that each tensor matters: experts' biases decide choices, norms are not 1, no bias is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import ShardValues, StoredTensors
from moefoundry.checkpoint.weights import PREFIX, load_model
from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.convert import export_hf, import_hf, write_weights
from moefoundry.conversion.equivalent_tensors import EquivalentTensors
from moefoundry.conversion.families import Family, exports_as, holder_of
from moefoundry.conversion.families.equivalents import Equivalent
from moefoundry.conversion.parity import verify_outputs
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import moe_layers
from moefoundry.verify.ranks import World
from moefoundry.verify.result import Result, located
from moefoundry.verify.twin import Twin

LOGITS_BOUND = 1e-4
"""Largest difference of logits of about 1, in fp32, over the few blocks of a twin; a wrong tensor makes 1e-2."""
NO_FAMILY = "every tensor comes back"


def check(twin: Twin) -> Iterator[Result]:
    """Convert the twin there and back, and compare it with transformers."""
    cfg = twin.recipe.model
    try:
        family, same = holder_of(cfg)
    except UserError:
        yield Result(NO_FAMILY, None, detail=exports_as(cfg))
        return
    with World(convert, family.name, cfg, same, twin.recipe.max_seq_len, twin.room, ranks=1, room=twin.room) as world:
        results: list[Result] = world.results()[0]
        yield from results


def convert(name: str, cfg: ModelConfig, same: Equivalent, max_seq_len: int, room: Path) -> list[Result]:
    """Export, import and compare, on one rank; ``same`` is the model in the terms of the family."""
    from moefoundry.conversion.families import FAMILIES

    model = random_model(cfg)
    results = [covered(FAMILIES[name], same)]
    ours, hf, back = room / "ours", room / "hf", room / "back"
    save(model, ours, max_seq_len)
    try:
        export_hf(ours, hf, name)
        import_hf(hf, back)
    except Exception as error:
        text = " ".join(str(error).split())
        return [*results, Result(NO_FAMILY, False, detail=f"{type(error).__name__}: {text}")]
    return [*results, compared(ours, same, back), computed(hf, load_model(ours))]


@torch.no_grad()
def random_model(cfg: ModelConfig) -> MoETransformer:
    """Make the model with values of which each matters."""
    model = meta_model(cfg).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            tensor.uniform_(
                0.0, 0.5, generator=generator
            )  # not below 0: transformers' groups differ there, see families.md
        elif tensor.dim() > 1:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        else:
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    if cfg.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save(model: MoETransformer, directory: Path, max_seq_len: int) -> None:
    """Write a weights-only checkpoint."""
    directory.mkdir()
    tensors = model.state_dict()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    shards = (ShardValues(name, (0,) * tensor.dim(), tensor) for name, tensor in tensors.items())
    write_weights(directory, model.cfg, specs, shards, max_seq_len)


def covered(family: Family, same: Equivalent) -> Result:
    """Count the elements that the family has a place for, tensor by tensor."""
    cfg, claim = same.cfg, "every expert and bias has its Hugging Face tensor"
    model = meta_model(cfg)
    tensors = model.state_dict()
    found: Counter[str] = Counter()
    for piece in family.pieces(cfg):
        whole = tensors[piece.name]
        part = whole if piece.expert is None else whole[piece.expert]
        found[piece.name] += (part if piece.our_rows is None else part[slice(*piece.our_rows)]).numel()
    if cfg.tie_embeddings:
        found["lm_head.weight"] = found["embed_tokens.weight"]
    for name, tensor in tensors.items():
        if found[name] != tensor.numel():
            text = f"{found[name]} of {tensor.numel()} elements of {located(name)}"
            return Result(claim, False, detail=f"{family.name} has {text}")
    layers = moe_layers(model)
    biases = sum(name.endswith("bias") for name in tensors)
    text = f"{family.name}: {len(tensors)} tensors, {len(layers) * cfg.moe.num_experts} experts, {biases} biases"
    added = f"; it computes the same with {' and '.join(same.changes)}" if same.changes else ""
    return Result(claim, True, detail=text + added)


def compared(ours: Path, same: Equivalent, back: Path) -> Result:
    """Compare what came back, bit for bit."""
    expected, got = EquivalentTensors(StoredTensors(ours, PREFIX), same), StoredTensors(back, PREFIX)
    different = [
        name
        for name, spec in expected.specs.items()
        if got.specs.get(name) != spec or not torch.equal(got.read(name), expected.read(name))
    ]
    detail = f"first {located(different[0])}" if different else f"{len(expected.specs)} tensors, bit for bit"
    return Result("every tensor comes back", not different, float(len(different)), 0.0, detail)


def computed(hf: Path, model: MoETransformer) -> Result:
    """Compare with transformers' own model of the exported files."""
    claim = "transformers computes the same logits"
    try:
        found = verify_outputs(hf, model, math.inf)
    except UserError as error:
        return Result(claim, None, detail=str(error).removeprefix(f"{hf} cannot be verified: "))
    detail = f"transformers {found.transformers}"
    passed = found.logits <= LOGITS_BOUND
    if not passed:
        blocks = (number for number, size in enumerate(found.hidden) if not size <= LOGITS_BOUND)
        first = next(blocks, None)
        detail += ": the head differs" if first is None else f": first block {first}, by {found.hidden[first]:.1e}"
    return Result(claim, passed, found.logits, LOGITS_BOUND, detail)
