"""Traffic of a rank in an optimizer step, by collective and mesh axis.

Bytes that rank 0 sends to the n - 1 other ranks are counted: its shard to each of them in an all-gather, their shards
in a reduce-scatter, both of these for one n-th of the buffer in an all-reduce, their rows in an all-to-all. Experts are
assigned in turn, from ``router.top_k_groups`` groups a token (``router.assignment: uniform``); a token is sent once to
a rank that has several of its experts. Metrics and the gradient norm, a few kB, are not counted.

FSDP gathers a unit for the forward pass and, unless it is the root or the embedding, again for the backward pass, with
``fsdp_all_gather`` in FP8; with ``mesh.gather: each_step`` once a step. Gradients are reduce-scattered after each
micro-batch, or with ``mesh.reduce: each_step`` after the last, and all-reduced between copies then. Rows are sent to
the experts and back, forward and backward; if the forward pass is recomputed (``full``), to the experts once more, and
back where a norm follows or in chunks. ``selective`` keeps received rows. In chunks (``model.moe.dispatch_chunks``) the
same rows go in more calls, and counts are of each chunk. DeepEP is counted as if it were ``all_to_all``.

Muon exchanges rows of updates once a step, by all-to-alls along ``shard`` and, where ranks have parts of each expert,
``expert_shard``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moefoundry.config import ActivationCheckpointing, AuxLossScope, Fp8Recipe, Gather, Recipe, Reduce
from moefoundry.mesh import EXPERT, EXPERT_NODE, EXPERT_PLACE, REPLICATE, MeshDegrees
from moefoundry.moe.dealing import dealt_once, tokens_by_place
from moefoundry.ops.sizes import row_bytes
from moefoundry.planning.ffn_stages import block_ends_with_experts
from moefoundry.planning.matrices import Exchanges
from moefoundry.planning.units import FP32, PlannedBlock, Unit, compute_bytes
from moefoundry.planning.world import WORLD, groups_by_axis, peers_on_other_nodes

COUNT_BYTES = 8
"""Bytes of a count of rows, int64."""


@dataclass(frozen=True)
class Traffic:
    """One collective on one mesh axis, in an optimizer step.

    Attributes:
        collective: ``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``.
        axis: Mesh axis, or ``world``.
        ranks: Ranks of a group along it.
        calls: Number of calls.
        sent: Bytes that rank 0 sends to others.
        across_nodes: Bytes that are sent to other nodes if each pair exchanges directly, by the rank with most peers on
            other nodes; rings and trees send less.
    """

    collective: str
    axis: str
    ranks: int
    calls: int
    sent: int
    across_nodes: int


class Ledger:
    """Adds up collectives.

    Args:
        degrees: Degrees of the mesh.
    """

    def __init__(self, degrees: MeshDegrees) -> None:
        self.degrees = degrees
        self.groups = groups_by_axis(degrees)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()

    def ranks(self, axis: str) -> int:
        """Count the ranks of a group along ``axis``."""
        return self.groups[axis].ranks

    def add(self, collective: str, axis: str, sent: int, calls: int = 1, parts: int = 1) -> None:
        """Add ``calls`` collectives that send ``sent`` bytes each, in so many parts."""
        self.calls[collective, axis] += calls * parts
        self.sent[collective, axis] += calls * sent

    def add_all_reduce(self, axis: str, size: int, calls: int = 1) -> None:
        """Add all-reduces of ``size`` bytes each."""
        self.add("all_reduce", axis, 2 * (self.ranks(axis) - 1) * size // self.ranks(axis), calls)

    def add_unit(self, unit: Unit, micro_batches: int) -> None:
        """Add the collectives of an FSDP unit."""
        if unit.shards > 1:
            others = unit.shards - 1
            gathers = unit.gathers * (1 if self.degrees.gather == Gather.each_step else micro_batches)
            self.add("all_gather", unit.axis, others * unit.gathered_share, gathers)
            if unit.trained_shard_numel:
                reduced = others * unit.trained_shard_numel * unit.reduce_bytes
                reductions = 1 if self.degrees.reduce == Reduce.each_step else micro_batches
                self.add("reduce_scatter", unit.axis, reduced, reductions)
        if unit.copies > 1 and unit.trained_shard_numel:
            self.add_all_reduce(REPLICATE, unit.trained_shard_numel * unit.reduce_bytes)

    def add_matrices(self, exchanges: Exchanges) -> None:
        """Add the exchanges of the rows of updates."""
        self.add("all_to_all", exchanges.axis, exchanges.sent, parts=2 * exchanges.number)

    def add_exchange(self, routed: Routed, layers: int, runs: int) -> None:
        """Add the exchanges of ``layers`` MoE layers, with ``runs`` forward passes each before the backward pass."""
        ranks, pairs = self.ranks(EXPERT), routed.pairs_by_rank
        self.add("all_to_all", EXPERT, (ranks - 1) * 2 * COUNT_BYTES * routed.chunks, layers * runs)
        self._add_hop(EXPERT, sum(pairs[1:]), (ranks - 1) * pairs[0], routed, layers, runs)

    def add_two_hop_exchange(self, routed: Routed, layers: int, runs: int) -> None:
        """Add the exchanges in two hops: a token is sent once to each node, and from there once to each rank."""
        ranks, nodes, places = self.ranks(EXPERT), self.ranks(EXPERT_NODE), self.ranks(EXPERT_PLACE)
        counts = (nodes + 2 * ranks) * COUNT_BYTES * routed.chunks
        self.add("all_gather", EXPERT, (ranks - 1) * counts, layers * runs)
        pairs = routed.pairs_by_node
        self._add_hop(EXPERT_NODE, sum(pairs[1:]), (nodes - 1) * pairs[0], routed, layers, runs)
        pairs = [nodes * count for count in routed.pairs_by_rank[:places]]
        self._add_hop(EXPERT_PLACE, sum(pairs[1:]), (places - 1) * pairs[0], routed, layers, runs)

    def _add_hop(self, axis: str, go: int, back: int, routed: Routed, layers: int, runs: int) -> None:
        """Add one hop: rank 0 sends ``go`` tokens, and returns ``back`` tokens that it received."""
        self.add("all_to_all", axis, go * routed.slot_bytes, layers * runs, routed.chunks)
        self.add("all_to_all", axis, back * routed.slot_bytes, layers, routed.chunks)  # gradients of the weights
        # backward, once: gradients of the results are sent to the experts, gradients of the tokens return
        returns = runs if routed.returns_again else 1
        self.add("all_to_all", axis, go * routed.spread_bytes, layers * (runs + 1), routed.chunks)
        self.add("all_to_all", axis, back * routed.collected_bytes, layers * (returns + 1), routed.chunks)

    def entries(self, gpus_per_node: int) -> list[Traffic]:
        """List the traffic, by collective and axis."""
        remote = peers_on_other_nodes(self.degrees, gpus_per_node)
        return [
            Traffic(
                collective=collective,
                axis=axis,
                ranks=self.ranks(axis),
                calls=self.calls[collective, axis],
                sent=sent,
                across_nodes=sent * remote[axis] // max(1, self.ranks(axis) - 1),
            )
            for (collective, axis), sent in self.sent.items()
        ]


@dataclass(frozen=True)
class Routed:
    """Destinations of the slots of one rank's micro-batch, assigned to the experts in turn.

    Attributes:
        pairs_by_rank: Tokens that have an expert on each rank of the expert group.
        pairs_by_node: Tokens that have an expert on each node that it spans.
        spread_bytes: Bytes of a token's row to its experts.
        collected_bytes: Bytes of a row back.
        slot_bytes: Bytes of the numbers and weights of a token's K experts.
        chunks: Chunks in which the tokens go.
        returns_again: A recomputed forward pass returns the results, too.
    """

    pairs_by_rank: list[int]
    pairs_by_node: list[int]
    spread_bytes: int
    collected_bytes: int
    slot_bytes: int
    chunks: int
    returns_again: bool


def route_in_turn(recipe: Recipe, degrees: MeshDegrees, tokens: int) -> Routed:
    """Route ``tokens`` tokens."""
    moe, router, c = recipe.model.moe, recipe.model.moe.router, compute_bytes(recipe.precision)
    dealt = dealt_once(moe.top_k, moe.num_experts, router.num_groups, router.top_k_groups)
    width, fp8 = recipe.model.d_model, recipe.precision.fp8.recipe == Fp8Recipe.deepseek_v3
    return Routed(
        pairs_by_rank=tokens_by_place(tokens, dealt, moe.num_experts, degrees.expert),
        pairs_by_node=tokens_by_place(tokens, dealt, moe.num_experts, degrees.expert_nodes),
        spread_bytes=row_bytes(width) if fp8 else width * c,
        collected_bytes=width * c,
        slot_bytes=2 * moe.top_k * FP32,
        chunks=moe.dispatch_chunks,
        returns_again=not block_ends_with_experts(recipe.model),
    )


def step_traffic(
    recipe: Recipe,
    degrees: MeshDegrees,
    blocks: Sequence[PlannedBlock],
    units: Sequence[Unit],
    micro_batches: Counter[int],
    gpus_per_node: int,
    exchanges: Sequence[Exchanges] = (),
) -> list[Traffic]:
    """Compute the traffic of an optimizer step.

    Args:
        recipe: The recipe.
        degrees: Degrees of the mesh.
        blocks: Blocks of the sharded model.
        units: FSDP units of the sharded model.
        micro_batches: Micro-batches of a rank, by their sequences.
        gpus_per_node: Ranks of a node.
        exchanges: Exchanges of rows of updates.
    """
    ledger = Ledger(degrees)
    for unit in units:
        ledger.add_unit(unit, micro_batches.total())
    if degrees.expert > 1:
        runs = 2 if recipe.activation_checkpointing == ActivationCheckpointing.full else 1
        add = ledger.add_exchange if degrees.expert_nodes == 1 else ledger.add_two_hop_exchange
        sparse = Counter(block.positions for block in blocks if block.sparse)
        for sequences, times in micro_batches.items():
            for positions, layers in sparse.items():
                add(route_in_turn(recipe, degrees, sequences * positions), layers * times, runs)
    moe = recipe.model.moe
    if moe.balance.aux_loss_scope == AuxLossScope.global_batch and degrees.world_size > 1:
        size = sum(block.sparse for block in blocks) * moe.num_experts * COUNT_BYTES
        ledger.add_all_reduce(WORLD, size, micro_batches.total())
    for each in exchanges:
        ledger.add_matrices(each)
    return ledger.entries(gpus_per_node)
