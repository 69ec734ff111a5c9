"""Memory of the rank that needs most: permanent, exactly, and transient, as an estimate.

Permanent are this rank's shards of fp32 parameters, and of gradients and optimizer state of those that train. Transient
memory is largest at one of these moments of a micro-batch:

    block i forward     only with an indexer: saved activations of blocks before i, and the scores of all keys
    the loss            all saved activations, the logits of a chunk, the output head's gradient in fp32
    block i backward    saved activations of blocks before i, and those of a stage of i; block i gathered, and the one
                        before it, which is prefetched; gradients in the compute dtype and in their reduction
    the end             gradients of the root unit (output head) and of the embedding, in the same two forms

The root unit stays gathered, with an embedding that is tied; any other embedding does not. With ``mesh.gather:
each_step`` all units do. With ``mesh.reduce: each_step`` and several micro-batches there are sums of whole gradients,
in fp32. All gradients are counted at each of these moments, as they exist from the second micro-batch on. The CUDA
context, communication buffers and fragmentation are not counted.

The moving average of the parameters is in the memory of the host, and counted separately.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moefoundry.config import Fp8Recipe, Gather, IndexerStage, Moments, MuonConfig, Recipe, Reduce
from moefoundry.ops.sizes import CHUNK_TOKENS, KERNEL_CHUNK_TOKENS, REDUCTIONS
from moefoundry.planning.activations import Moment, block_activations
from moefoundry.planning.fp8_weights import kept_bytes
from moefoundry.planning.outline import ShardedOutline
from moefoundry.planning.stages import ATTENTION
from moefoundry.planning.stages import EXPERTS as EXPERTS_GROUP
from moefoundry.planning.units import FP32, PlannedBlock, Unit, compute_bytes
from moefoundry.planning.weights import EMBEDDING, EXPERTS


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
        parameters: fp32 shards, with FSDP's padding; on one rank all, and their narrow copies; weights that are kept in
            FP8. Exact.
        gradients: Reduced gradients, as the parameters that train; exact.
        optimizer: AdamW's two moments of these, or of matrices Muon's momentum, without padding; exact.
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
    moments = transients(outline.planned_blocks(recipe.max_seq_len), units, recipe, sequences)
    if recipe.mesh.gather == Gather.each_step:
        moments = [replace(moment, gathered_parameters=_gathered(units)) for moment in moments]
    several = recipe.global_train_batch_size > outline.degrees.world_size * sequences
    if several and recipe.mesh.reduce == Reduce.each_step:
        whole = FP32 * sum(unit.trained_full_numel for unit in units) - FP32 * reduced  # shards take their place later
        moments = [replace(moment, unreduced_gradients=moment.unreduced_gradients + whole) for moment in moments]
    return Memory(
        parameters=FP32 * stored + _narrow_copies(outline, recipe) + kept_bytes(outline, recipe),
        gradients=FP32 * reduced,
        optimizer=_optimizer(outline, recipe),
        peak=max(moments, key=lambda moment: moment.total),
        host=2 * FP32 * trained if recipe.ema else 0,
    )


def _optimizer(sharded: ShardedOutline, recipe: Recipe) -> int:
    """Compute the bytes of the optimizer's state."""
    if isinstance(recipe.optimizer, MuonConfig):
        return 2 * FP32 * sharded.trained - FP32 * sharded.matrices.owned
    return 2 * (FP32 if recipe.precision.optimizer_moments == Moments.fp32 else 2) * sharded.trained


def _narrow_copies(sharded: ShardedOutline, recipe: Recipe) -> int:
    """Compute the bytes of the copies that one rank multiplies by; FSDP makes its own when it gathers."""
    itemsize = compute_bytes(recipe.precision)
    if sharded.units or itemsize == FP32:
        return 0
    spared = sum(weight.numel for block in sharded.outline.blocks for weight in block if weight.wide_module)
    return itemsize * (sharded.owned - spared)


def transients(
    blocks: Sequence[PlannedBlock], units: Sequence[Unit], recipe: Recipe, sequences: int
) -> list[Transient]:
    """List every moment that may be the largest, in order of time."""
    cfg, c = recipe.model, compute_bytes(recipe.precision)
    masks = _masks(recipe, blocks, sequences)
    root, embedding, units_of = _by_block(blocks, units)
    mode, fp8 = recipe.activation_checkpointing, recipe.precision.fp8.recipe == Fp8Recipe.deepseek_v3
    kinds = {(block.sparse, block.linear, block.masked) for block in blocks}
    ranks, rows = recipe.mesh.expert, sequences * recipe.max_seq_len * cfg.moe.top_k / cfg.moe.num_experts
    of_kind = {
        kind: block_activations(cfg, kind[0], mode, c, ranks, fp8, *kind[1:], rows * ranks, recipe.max_seq_len)
        for kind in kinds
    }
    activations = [of_kind[block.sparse, block.linear, block.masked] for block in blocks]
    tokens = [sequences * block.positions for block in blocks]
    saved = [number * each.saved for number, each in zip(tokens, activations, strict=True)]
    head = cfg.vocab_size * cfg.d_model if _head_trains(recipe) else 0  # elements that have a gradient
    backward, before = [], sum(saved)
    held = _Held(c)
    for i, block in reversed(list(enumerate(blocks))):
        before -= saved[i]
        heads_left, beside = _further(i - cfg.n_layers, cfg.mtp.depth)
        found_in = held.moments(block, units_of[i], activations[i].moments)
        moments = [(round(tokens[i] * alive), gradients) for alive, gradients in found_in]
        moments.append((tokens[i] * c * cfg.d_model, _gradients(units_of[i]) + held.reduce(units_of[i])))
        alive, gradients = max(moments, key=sum)
        backward.append(
            Transient(
                f"backward of {block.name}",
                gathered_parameters=_gathered([*root, *units_of[i]]) + _in_flight(units_of[i - 1] if i else []),
                unreduced_gradients=head * ((c if units else 0) + FP32 * heads_left) + gradients,
                activations=before + beside * tokens[i] * c * cfg.d_model + alive,
            )
        )
    of_root = _gradients([*root, *embedding]) + held.reduce(root)
    end = Transient("the end of the backward pass", 0, max(of_root, _gradients(embedding) + held.reduce(embedding)), 0)
    choices = [round(number * each.forward) for number, each in zip(tokens, activations, strict=True)]
    found = [
        *_forward(blocks, root, units_of, saved, choices),
        *_losses(recipe, root, units_of, sum(saved), sequences * recipe.max_seq_len, head),
        *backward,
        end,
    ]
    return [replace(moment, activations=moment.activations + masks) for moment in found]


def _masks(recipe: Recipe, blocks: Sequence[PlannedBlock], sequences: int) -> int:
    """Count the bytes of attention's masks in fp32, one for each kind of block that takes one; BF16 has none."""
    cfg, length = recipe.model, recipe.max_seq_len
    if compute_bytes(recipe.precision) < FP32:
        return 0
    windows = {cfg.attention.window_of(index) for index in range(len(blocks))}
    short = {window for window in windows if window is not None and window < length}
    if cfg.document_masking:
        return length**2 * sequences * (len(short) + (len(windows) > len(short)))
    return length**2 * len(short)


def _forward(
    blocks: Sequence[PlannedBlock],
    root: list[Unit],
    units_of: list[list[Unit]],
    saved: Sequence[int],
    choices: Sequence[int],
) -> Iterator[Transient]:
    """Yield the moments of forward passes of blocks, for those that have more than they keep.

    Args:
        blocks: The blocks.
        root: Units of the root.
        units_of: Units of each block.
        saved: Bytes of activations that each keeps.
        choices: Bytes that exist in each for a moment.
    """
    before = 0
    for block, units, following, kept, choice in zip(
        blocks, units_of, [*units_of[1:], []], saved, choices, strict=True
    ):
        if choice:
            gathered = _gathered([*root, *units]) + _in_flight(following)
            yield Transient(f"forward of {block.name}", gathered, 0, before + choice)
        before += kept


def _head_trains(recipe: Recipe) -> bool:
    indexer = recipe.model.attention.trained_indexer
    return recipe.lora is None and (indexer is None or indexer.stage != IndexerStage.warm_up)


def _by_block(blocks: Sequence[PlannedBlock], units: Sequence[Unit]) -> tuple[list[Unit], list[Unit], list[list[Unit]]]:
    """Divide units into the root's, the embedding's, and those of each block."""
    found: dict[str, list[Unit]] = {name: [] for name in ("", EMBEDDING, *(block.name for block in blocks))}
    for unit in units:
        found[".".join(unit.name.split(".")[:2])].append(unit)
    root, embedding, *units_of = found.values()
    return root, embedding, units_of


def _losses(
    recipe: Recipe, root: list[Unit], units_of: list[list[Unit]], saved: int, tokens: int, head: int
) -> list[Transient]:
    """List the moments of the loss: its forward pass, a chunk of tokens at a time, and its backward pass.

    The forward pass computes gradients of the hidden states and of the head, the latter in fp32; the backward pass
    multiplies both, the head's into the compute dtype.
    """
    cfg, c = recipe.model, compute_bytes(recipe.precision)
    narrow = c if c < FP32 else 0  # bytes of an fp32 element's copy in the compute dtype
    heads, of_hidden = 1 + cfg.mtp.depth, tokens * c * cfg.d_model
    gathered = _gathered(root)
    last = [unit for unit in units_of[-1][-1:] if unit.shards > 1] if units_of else []
    logits, again = min(tokens, CHUNK_TOKENS) * (FP32 + narrow), 0
    if recipe.dpo is not None or recipe.losses.logits_z is not None:  # of operators, by autograd, for each chunk again
        logits, again = min(tokens, CHUNK_TOKENS) * (2 * FP32 + narrow), min(tokens, CHUNK_TOKENS) * 3 * FP32
    elif recipe.fused_kernels and narrow and not cfg.head_bias:  # the kernel works in the memory of narrow logits
        logits = min(tokens, KERNEL_CHUNK_TOKENS) * narrow
    return [
        Transient(
            "the loss",
            gathered_parameters=gathered + _gathered(last),
            unreduced_gradients=head * (heads * FP32 + narrow),
            activations=saved + (3 + 5 * cfg.mtp.depth) * of_hidden,
            logits=logits * cfg.vocab_size,
        ),
        Transient(
            "the loss's backward pass",
            gathered_parameters=gathered + (_in_flight(units_of[-1]) if units_of else 0),
            unreduced_gradients=head * (heads * FP32 + c),
            activations=saved + (3 + 5 * cfg.mtp.depth) * of_hidden,
            logits=again * cfg.vocab_size,
        ),
    ]


def _further(module: int, depth: int) -> tuple[int, int]:
    """Count what multi-token prediction keeps while a block runs backward: heads' gradients, and vectors of D a token.

    The main head runs backward first, then those of the modules, last first. Of the main head and of each module before
    this one there are the output, its input and the gradient; a module also has its two inputs side by side. The
    embeddings' gradient stays to the end.

    Args:
        module: Number of the module that has the block; below 0 for the model's own blocks.
        depth: Number of modules.
    """
    if module < 0:
        return 0, min(1, depth)
    return module, 3 + 2 + 4 * module


class _Held:
    """Gradients of weights while blocks run backward, the last first.

    Where FSDP reduces them, gradients of a unit add up until its reduction, whose input stays until ``REDUCTIONS``
    others have begun; otherwise each is added to what is there at once.
    """

    def __init__(self, c: int) -> None:
        self.c = c
        self.inputs: deque[int] = deque(maxlen=REDUCTIONS)

    def moments(
        self, block: PlannedBlock, units: Sequence[Unit], stages: Iterable[Moment]
    ) -> Iterator[tuple[float, int]]:
        """Yield the bytes a token of activations, and the bytes of gradients of weights, at each stage of a block."""
        experts = [unit for unit in units if unit.name.endswith(EXPERTS)]
        others = [unit for unit in units if unit.param_bytes != self.c] if block.sparse else []  # the router
        made = computed = 0.0
        for stage in stages:
            elements = block.weights.get(stage.weights, 0) * stage.share
            if not units:
                yield stage.alive, round(elements * self.c)
                continue
            if experts and computed > 0.99:  # all of theirs are computed, and reduced before the others
                yield stage.alive, round(made) + self.reduce(experts)
                made = computed = 0.0
            computed += stage.share if stage.weights == EXPERTS_GROUP else 0
            made += elements * self.c
            if others and stage.weights == ATTENTION:
                self.reduce(others)
                others = []
            yield stage.alive, round(made) + sum(self.inputs)

    def reduce(self, units: Sequence[Unit]) -> int:
        """Begin to reduce the outermost of these units. Returns the bytes of all inputs then, and of its output."""
        if not units:
            return 0
        self.inputs.append(units[0].reduce_input)
        return sum(self.inputs) + units[0].trained_shard_numel * units[0].reduce_bytes


def _in_flight(units: Iterable[Unit]) -> int:
    """Bytes of parameters that are gathered ahead."""
    return sum(unit.gathered for unit in units if unit.shards > 1)


def _gathered(units: Iterable[Unit]) -> int:
    return sum(unit.gathered for unit in units)


def _gradients(units: Iterable[Unit]) -> int:
    return sum(unit.gradients for unit in units if not unit.name.endswith(EXPERTS))
