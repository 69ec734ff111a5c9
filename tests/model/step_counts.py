"""Count what a training step and one block of it do, without a GPU: the model runs on the meta device.

    python -m tests.model.step_counts [--update]

prints what ``test_step_counts.py`` compares with ``step_counts.json``, or writes it there. Meta tensors take every
branch of a device that is not a CPU, and have no values: whatever would make the host wait for the device fails. The
numbers of a block are the difference between models of two blocks and of one. A whole step is one of a model of
``STEP_BLOCKS`` blocks with BF16 copies of its weights, after another step: forward and backward, the norm of the
gradients and their clipping, AdamW with BF16 moments.
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
from torch.utils._pytree import tree_leaves

from moefoundry.callbacks.health import FiniteCheck, GradientNorm
from moefoundry.config import AdamWConfig, Compute, Moments, NonFinite, PrecisionConfig, Recipe, load_recipe
from moefoundry.model import context
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.moe.router import Router
from moefoundry.ops import adamw_kernel, order_kernel
from moefoundry.ops.fused_experts import launches as fused
from moefoundry.ops.router_kernels import function as by_router
from moefoundry.ops.row_kernels import function as by_row
from moefoundry.optim import build_adamw
from moefoundry.parallel import parallelize
from tests.ops.compiling import launching_on_meta

GOLDEN = Path(__file__).with_name("step_counts.json")
BACKENDS = ("grouped_mm", "triton")
BATCH, SEQ_LEN = 4, 4096
STEP_BLOCKS = 2
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
ORDER = ("count_slots", "sum_blocks", "place_slots")


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
        if not func.is_view and name not in NO_KERNEL and _on_meta(args, kwargs, result):
            self.counts[name] += 1
        return result


def _on_meta(*nested: Any) -> bool:
    """Tell operators of the device from those of the host."""
    return any(isinstance(leaf, Tensor) and leaf.device.type == "meta" for leaf in tree_leaves(nested))


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
    """Let attention, router, the fused experts, the kernels over rows and AdamW take the way they take on a GPU."""
    launches = Launches()
    functional = mock.MagicMock(wraps=F, scaled_dot_product_attention=flash_attention)
    with (
        mock.patch.multiple(order_kernel, **{name: getattr(launches, name) for name in ORDER}),
        mock.patch.object(context, "F", functional),
        mock.patch.object(fused, "kernels", launches),
        launching_on_meta(),
        mock.patch.object(by_row, "kernels", launches),
        mock.patch.object(by_router, "kernels", launches),
        mock.patch.multiple(order_kernel, **{name: getattr(launches, name) for name in ORDER}),
        mock.patch.object(adamw_kernel, "adamw", launches.adamw),
        mock.patch("moefoundry.ops.kernel_choice._fused", True),
        mock.patch("moefoundry.ops.kernel_choice._can_run", return_value=True),
        mock.patch("moefoundry.ops.fused_experts.obstacle", return_value=""),
    ):
        yield launches


class Kept:
    """Bytes that are kept for the backward pass, parameters and their copies not among them.

    Args:
        model: Whose parameters they are.
    """

    def __init__(self, model: nn.Module) -> None:
        copies = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        self.weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *copies)}
        self.bytes: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.bytes[storage._cdata] = storage.nbytes()
        self.alive.append(tensor)  # or another tensor could get its number
        return tensor

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def olmoe(backend: str, blocks: int) -> Recipe:
    """OLMoE's recipe with so many blocks."""
    return load_recipe(None, [*OLMOE, f"model.n_layers={blocks}", f"model.moe.backend={backend}"])


def step(backend: str, blocks: int) -> tuple[Counter[str], Counter[str], int]:
    """Run forward and backward; give the operators of both, and the bytes that are kept between them."""
    model = _in_bf16(meta_model(olmoe(backend, blocks).model))
    ids = torch.empty(BATCH, SEQ_LEN, dtype=torch.int64, device="meta")
    kept = Kept(model)
    with as_on_a_gpu() as launches:
        with _counted(launches) as forward, saved_tensors_hooks(kept, lambda tensor: tensor):
            loss = model(ids, ids).total
        with _counted(launches) as backward:
            loss.backward()
    return forward, backward, kept.total


@contextmanager
def _counted(launches: Launches) -> Iterator[Counter[str]]:
    """Count operators and launches of kernels."""
    counts: Counter[str] = Counter()
    with Operators() as operators:
        yield counts
    counts.update(operators.counts + launches.counts)
    launches.counts.clear()


class WholeStep:
    """A model with all that a step needs.

    Args:
        backend: Of the experts.
        blocks: Of the model.
    """

    def __init__(self, backend: str, blocks: int = STEP_BLOCKS) -> None:
        recipe = olmoe(backend, blocks)
        self.model = meta_model(recipe.model)
        parallelize(self.model, None, PrecisionConfig(compute=Compute.bf16))
        self.model.train()
        self.optimizer = build_adamw(self.model, AdamWConfig(lr=1e-3), Moments.bf16_stochastic)
        self.norm = GradientNorm(max_norm=1.0)
        self.finite = FiniteCheck(self.norm, NonFinite.stop)
        self.ids_BS = torch.empty(BATCH, SEQ_LEN, dtype=torch.int64, device="meta")
        self.state = mock.MagicMock(model=self.model)

    def run(self, launches: Launches) -> dict[str, Any]:
        """Take a step; give the operators of its phases, and the bytes kept between forward and backward."""
        phases: dict[str, Any] = {}
        kept = Kept(self.model)
        with _counted(launches) as phases["forward"], saved_tensors_hooks(kept, lambda tensor: tensor):
            loss = self.model(self.ids_BS, self.ids_BS).total
        with _counted(launches) as phases["backward"]:
            loss.backward()
        self.state.loss = {"total": loss}
        self.finite.after_loss(self.state, mock.MagicMock())
        with _counted(launches) as phases["clipping"]:
            self.norm.after_train_batch(self.state, mock.MagicMock())
        with _counted(launches) as phases["optimizer"]:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: _sorted(counts) for name, counts in phases.items()} | {"kept_bytes": kept.total}


def whole_step(backend: str) -> dict[str, Any]:
    """Count a step that is not the first."""
    run = WholeStep(backend)
    with as_on_a_gpu() as launches:
        run.run(launches)
        return run.run(launches)


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


def counted() -> dict[str, Any]:
    """Give all that is kept in ``step_counts.json``."""
    return {backend: count(backend) | {"step": whole_step(backend)} for backend in BACKENDS}


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
    text = json.dumps(counted(), indent=1) + "\n"
    if parser.parse_args().update:
        GOLDEN.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
