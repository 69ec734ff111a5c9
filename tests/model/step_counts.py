"""Count what one block of a training step does, without a GPU: the model runs on the meta device.

    python -m tests.model.step_counts [--update]

prints what ``test_step_counts.py`` compares with ``step_counts.json``, or writes it there. Meta tensors take every
branch of a device that is not a CPU, and have no values: whatever would make the host wait for the device fails. The
numbers of a block are the difference between models of two blocks and of one.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.config import load_recipe
from moefoundry.model import context
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.moe.router import Router
from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fused_experts import function as fused
from moefoundry.ops.row_kernels import function as by_row

GOLDEN = Path(__file__).with_name("step_counts.json")
BACKENDS = ("grouped_mm", "triton")
BATCH, SEQ_LEN = 4, 4096
OLMOE = [
    *("run_name=counts", f"max_seq_len={SEQ_LEN}", "train_loader.dataset.local=none", "optimizer.lr=1"),
    *("scheduler.t_warmup=0ba", "max_duration=1ba", "global_train_batch_size=1", "model.vocab_size=50304"),
    *("model.d_model=2048", "model.n_dense_layers=0", "model.attention.n_heads=16", "model.attention.n_kv_heads=16"),
    *("model.moe.num_experts=64", "model.moe.top_k=8", "model.moe.expert_hidden_size=1024"),
    *("model.moe.num_shared_experts=0", "model.moe.balance.aux_loss_weight=0.01"),
]
"""OLMoE's layer."""
NO_KERNEL = {
    "_unsafe_view",
    "promote_types",
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "lift_fresh",
}
"""Operators that launch nothing, beside views."""


class Operators(TorchDispatchMode):
    """Operators that would launch at least one kernel, counted by name.

    Attributes:
        counts: By name; kernels of ours are counted by :func:`counted_launches`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.counts[name] += 1
        return result


class Launches:
    """Stand-in for the module of Triton kernels: a launch is only counted.

    Attributes:
        counts: By name of the kernel.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.counts[f"triton:{name}"] += 1

        return mock.MagicMock(__getitem__=lambda self, grid: launch)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, **_: Any) -> Tensor:
    """Use the kernel of a GPU, not the products that meta tensors get."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]


@contextmanager
def as_on_a_gpu() -> Iterator[Launches]:
    """Let attention, the fused experts and the kernels over rows take the way they take on a GPU."""
    launches = Launches()
    functional = mock.MagicMock(wraps=F, scaled_dot_product_attention=flash_attention)
    with (
        mock.patch.object(context, "F", functional),
        mock.patch.object(fused, "kernels", launches),
        mock.patch.object(by_row, "kernels", launches),
        mock.patch("moefoundry.ops.kernel_choice._fused", True),
        mock.patch("moefoundry.ops.row_kernels.choose_backend", return_value=Backend.TRITON),
        mock.patch("moefoundry.ops.fused_experts.obstacle", return_value=None),
    ):
        yield launches


def step(backend: str, blocks: int) -> tuple[Counter[str], Counter[str], int]:
    """Run forward and backward; give the operators of both, and the bytes that are kept between them."""
    model = _in_bf16(
        meta_model(load_recipe(None, [*OLMOE, f"model.n_layers={blocks}", f"model.moe.backend={backend}"]).model)
    )
    ids = torch.empty(BATCH, SEQ_LEN, dtype=torch.int64, device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # or another tensor could get its number
        return tensor

    with as_on_a_gpu() as launches:
        with Operators() as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, ids).total
        forward.counts += launches.counts
        launches.counts.clear()
        with Operators() as backward:
            loss.backward()
        backward.counts += launches.counts
    return forward.counts, backward.counts, sum(kept.values())


def count(backend: str) -> dict[str, Any]:
    """Count the operators of a block by pass, and the bytes a token that it keeps for its backward pass.

    ``outside`` has the operators outside the blocks: embedding, last norm, and the loss in chunks of the logits.
    """
    (forward1, backward1, kept1), (forward2, backward2, kept2) = (step(backend, blocks) for blocks in (1, 2))
    return {
        "outside": [_sorted(one - (two - one)) for one, two in ((forward1, forward2), (backward1, backward2))],
        "forward": _sorted(forward2 - forward1),
        "backward": _sorted(backward2 - backward1),
        "operators": [(forward2 - forward1).total(), (backward2 - backward1).total()],
        "kept_bytes_a_token": (kept2 - kept1) // (BATCH * SEQ_LEN),
    }


def _in_bf16(model: MoETransformer) -> MoETransformer:
    """Give parameters the dtype that FSDP casts them to: BF16 but for gates."""
    gates = {id(router.gate) for router in model.modules() if isinstance(router, Router)}
    for module in model.modules():
        if id(module) not in gates:
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(parameter.to(torch.bfloat16)))
    return model.train()


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write {GOLDEN.name}")
    text = json.dumps({backend: count(backend) for backend in BACKENDS}, indent=1) + "\n"
    if parser.parse_args().update:
        GOLDEN.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
