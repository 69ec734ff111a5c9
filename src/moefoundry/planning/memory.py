"""Memory of the rank that needs most: permanent, exactly, and transient, as an estimate.

Permanent are this rank's shards of fp32 parameters, and of gradients and optimizer state of those that train. Transient
memory is largest at one of these moments of a micro-batch:

    the loss            all saved activations, the logits of a chunk, the output head's gradient in fp32
    block i backward    saved activations of blocks up to i and the working set of i; block i gathered, and the one
                        before it, which is prefetched; its gradients, in the compute dtype and in their reduction
    the end             gradients of the root unit (embedding and head), in the same two forms

The root unit stays gathered. All gradients are counted at each of these moments, as they exist from the second
micro-batch on. The CUDA context, communication buffers and fragmentation are not counted.

The moving average of the parameters is in the memory of the host, and counted separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moefoundry.config import Fp8Recipe, Moments, Recipe
from moefoundry.ops.cross_entropy import CHUNK_TOKENS
from moefoundry.planning.activations import FP32, block_activations
from moefoundry.planning.outline import ShardedOutline, local_numel
from moefoundry.planning.units import PlannedBlock, Unit, compute_dtype
from moefoundry.precision import full_precision_modules


@dataclass(frozen=True)
class Transient:
    """Bytes that exist at one moment of a micro-batch; an estimate.

    Attributes:
        moment: Name of the moment.
        gathered_parameters: Unsharded parameters in the compute dtype.
        unreduced_gradients: Gradients before and in their reduction.
        activations: Activations saved for the backward pass, and in work.
        logits: Logits of a chunk of tokens.
    """

    moment: str
    gathered_parameters: int
    unreduced_gradients: int
    activations: int
    logits: int = 0

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.gathered_parameters + self.unreduced_gradients + self.activations + self.logits


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most; all but ``host`` on its device.

    Attributes:
        parameters: fp32 shards, with FSDP's padding; on one rank all, and their narrow copies. Exact.
        gradients: Reduced gradients, as the parameters that train; exact.
        optimizer: AdamW's two moments of these, without padding; exact.
        peak: Transient memory at its largest moment; an estimate.
        host: Memory of the CPU: the moving average, and page-locked copies of the parameters; exact.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: Transient
    host: int

    @property
    def total(self) -> int:
        """Most bytes on the device at a time."""
        return self.parameters + self.gradients + self.optimizer + self.peak.total


def memory(outline: ShardedOutline, recipe: Recipe, sequences: int) -> Memory:
    """Compute the memory of a sharded model.

    Args:
        outline: The model.
        recipe: The recipe that trains it.
        sequences: Sequences of the largest micro-batch of a rank.
    """
    units, owned, trained = outline.units, outline.owned, outline.trained
    stored = sum(unit.shard_numel for unit in units) if units else owned
    reduced = sum(unit.trained_shard_numel for unit in units) if units else trained
    moment_bytes = FP32 if recipe.precision.optimizer_moments == Moments.fp32 else 2
    moments = transients(outline.planned_blocks(recipe.max_seq_len), units, recipe, sequences)
    return Memory(
        parameters=FP32 * stored + _narrow_copies(outline, recipe),
        gradients=FP32 * reduced,
        optimizer=2 * moment_bytes * trained,
        peak=max(moments, key=lambda moment: moment.total),
        host=2 * FP32 * trained if recipe.ema else 0,
    )


def _narrow_copies(outline: ShardedOutline, recipe: Recipe) -> int:
    """Compute the bytes of the copies that one rank multiplies by; FSDP makes its own when it gathers."""
    itemsize = compute_dtype(recipe.precision).itemsize
    if outline.units or itemsize == FP32:
        return 0
    spared = [each for block in outline.blocks for each in full_precision_modules(block, recipe.precision)]
    return itemsize * (outline.owned - sum(local_numel(p) for module in spared for p in module.parameters()))


def transients(
    blocks: Sequence[PlannedBlock], units: Sequence[Unit], recipe: Recipe, sequences: int
) -> list[Transient]:
    """List every moment that may be the largest, in order of time."""
    cfg, c = recipe.model, compute_dtype(recipe.precision).itemsize
    root = [unit for unit in units if unit.name == ""]
    units_of = [[unit for unit in units if f"{unit.name}.".startswith(f"{block.name}.")] for block in blocks]
    exchanged, mode = recipe.mesh.expert > 1, recipe.activation_checkpointing
    fp8 = recipe.precision.fp8.recipe == Fp8Recipe.deepseek_v3
    activations = [block_activations(cfg, block.sparse, mode, c, exchanged, fp8, block.linear) for block in blocks]
    saved = [sequences * b.positions * a.saved for b, a in zip(blocks, activations, strict=True)]
    working = [sequences * b.positions * a.working for b, a in zip(blocks, activations, strict=True)]
    tokens = sequences * recipe.max_seq_len
    head, heads = 0 if recipe.lora else cfg.vocab_size * cfg.d_model, 1 + cfg.mtp.depth  # elements that have a gradient
    narrow = c if c < FP32 else 0  # bytes of an fp32 element's copy in the compute dtype
    loss = Transient(
        "the loss",
        gathered_parameters=_gathered(root),
        unreduced_gradients=head * (heads * FP32 + narrow),
        activations=sum(saved) + heads * tokens * cfg.d_model * (FP32 + 2 * c),
        logits=min(tokens, CHUNK_TOKENS) * cfg.vocab_size * (FP32 + 2 * narrow),
    )
    backward = [
        Transient(
            f"backward of {block.name}",
            gathered_parameters=_gathered([*root, *units_of[i], *(units_of[i - 1] if i else [])]),
            unreduced_gradients=head * c + _gradients(units_of[i]) + _in_reduction(units_of[i]),
            activations=sum(saved[: i + 1]) + working[i],
        )
        for i, block in reversed(list(enumerate(blocks)))
    ]
    end = Transient("the end of the backward pass", 0, _gradients(root) + _in_reduction(root), 0)
    return [loss, *backward, end]


def _gathered(units: Iterable[Unit]) -> int:
    return sum(unit.gathered for unit in units)


def _gradients(units: Iterable[Unit]) -> int:
    return sum(unit.gradients for unit in units)


def _in_reduction(units: Iterable[Unit]) -> int:
    """Compute the largest input and output of a reduction; FSDP keeps one at a time."""
    return max((unit.reduce_input + unit.trained_shard_numel * unit.reduce_bytes for unit in units), default=0)
