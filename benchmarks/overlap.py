"""``python -m benchmarks.overlap --out DIR``: what is computed while tokens travel, as Chrome traces of gloo ranks.

One MoE layer with its experts on four ranks, forward and backward, with its tokens in 1, 2 and 4 chunks: DIR gets the
trace of rank 0 of each. Exchanges are the spans ``gloo:all_to_all``, the experts' products ``aten::_grouped_mm``; what
is printed is the share of the products' time at which an exchange is under way. The ranks share the cores on which gloo
moves the rows: the traces show the order of things, and not how much is gained where a network moves them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.ranks import on_ranks

RANKS, CHUNKS = 4, (1, 2, 4)
TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 2048, 512, 512, 16, 4
EXCHANGE, PRODUCT = "gloo:all_to_all", "aten::_grouped_mm"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description="Trace exchanges that overlap.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the traces")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a rank")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for chunks in CHUNKS:
        path = args.out / f"chunks-{chunks}.json"
        on_ranks(trace, RANKS, chunks, args.tokens, str(path))
        print(f"{path}: an exchange under way at {share_with_an_exchange(path):.0%} of the products' time")


def share_with_an_exchange(path: Path) -> float:
    """Of the time of all products in a trace."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    exchanges, products = (
        sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == name)
        for name in (EXCHANGE, PRODUCT)
    )
    return sum(covered(exchanges, *product) for product in products) / sum(end - start for start, end in products)


def covered(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """How much of a span is covered by others, which are sorted by their starts."""
    total = 0.0
    for first, last in spans:
        total += max(0.0, min(last, end) - max(first, start))
        start = max(start, min(last, end))
    return total


def trace(chunks: int, tokens: int, path: str) -> None:
    """Train a layer for three steps, of which the last is traced."""
    layer = build(chunks)
    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    for _ in range(2):
        step(layer, x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(layer, x)
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(path)


def build(chunks: int) -> Any:
    """An MoE layer that holds this rank's experts."""
    from moefoundry.config import MoEConfig
    from moefoundry.moe.dispatch import AllToAllDispatcher
    from moefoundry.moe.layer import MoELayer

    cfg = MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        expert_hidden_size=HIDDEN,
        num_shared_experts=1,
        backend="grouped_mm",
        dispatch_chunks=chunks,
    )
    layer = MoELayer(WIDTH, cfg)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(weight.detach()[: EXPERTS // RANKS].clone()))
    layer.dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD)
    return layer


def step(layer: Any, x: torch.Tensor) -> None:
    dist.barrier()
    out, stats = layer(x)
    (out.sum() + stats.z_loss).backward()


if __name__ == "__main__":
    main()
