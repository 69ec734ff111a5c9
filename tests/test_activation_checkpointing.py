"""Activation checkpointing on one device: same numbers, less memory, and ``selective`` computes no product twice.

Memory is counted as the storages that are alive between forward and backward: checkpointing keeps what it keeps outside
of autograd's saved tensors.
"""

from __future__ import annotations

import gc
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moefoundry.config import Compute, Fp8Config, Fp8Recipe, LossConfig, LossesConfig, NormPosition, PrecisionConfig
from moefoundry.model.losses import build_losses
from moefoundry.model.transformer import CausalLMLosses, MoETransformer
from moefoundry.ops.recompute import keeping_nothing, on_the_host
from tests.model.tiny import batch, gradients, meta_model, tiny_config, tiny_model

MODES = ["none", "selective", "full"]
PRODUCTS = {"mm", "addmm", "bmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu"}


class Operations(TorchDispatchMode):
    """How often each operation runs while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """Storages that operations returned while the mode was on, and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def bytes_alive(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.storages.items() if not storage.expired())


def model(mode: str, backend: str = "grouped_mm", dtype: torch.dtype = torch.float32, **kwargs) -> MoETransformer:
    cfg = tiny_config(backend=backend, aux_loss_weight=0.3, z_loss_weight=0.07)
    return tiny_model(cfg, activation_checkpointing=mode, dtype=dtype, **kwargs)


def step(module: MoETransformer) -> tuple[CausalLMLosses, dict[str, Tensor]]:
    losses = module(batch(), batch())
    losses.total.backward()
    return losses, gradients(module)


def backward_operations(mode: str, backend: str = "grouped_mm") -> tuple[Counter[str], Counter[str]]:
    """Operations of the forward and of the backward pass."""
    module = model(mode, backend)
    with Operations() as forward:
        total = module(batch(), batch()).total
    with Operations() as backward:
        total.backward()
    return forward.counts, backward.counts


def products(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name in PRODUCTS}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("grouped_mm", torch.float32), ("loop", torch.float32), ("loop", torch.float64)]
)
def test_losses_and_gradients_have_the_same_bits(mode: str, backend: str, dtype: torch.dtype) -> None:
    modules = [model("none", backend, dtype), model(mode, backend, dtype)]
    further = build_losses(LossesConfig(logits_z=LossConfig(weight=0.1), router_entropy=LossConfig(weight=-0.1)))
    for module in modules:
        module.use_losses(further)
    (losses, grads), (other_losses, other_grads) = map(step, modules)
    assert losses.of_tokens.keys() == {"router_entropy"}
    torch.testing.assert_close(losses._asdict(), other_losses._asdict(), rtol=0, atol=0)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


FOLLOWED = [NormPosition.after, NormPosition.both, "padding"]
"""What follows the experts; norms keep their output for the backward pass, so that it has to be there again."""


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("by", FOLLOWED)
def test_what_follows_the_experts_is_read_again(by: NormPosition | str, mode: str) -> None:
    cfg, ids = tiny_config(), batch(2, 12)
    if isinstance(by, NormPosition):
        cfg.norm.position = by
    documents = torch.where(torch.arange(12) < 9, 0, -1).expand(2, 12) if by == "padding" else None
    found = []
    for each in ("none", mode):
        module = tiny_model(cfg, activation_checkpointing=each)
        with Operations() as forward:
            losses = module(ids, ids, sequence_id=documents)
        with Operations() as backward:
            losses.total.backward()
        found.append((losses.total.detach(), gradients(module), products(forward.counts), products(backward.counts)))
    (loss, grads, *counts), (other_loss, other_grads, *other_counts) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())
    assert mode == "full" or counts == other_counts


def test_selective_keeps_no_output_of_experts_that_nothing_reads() -> None:
    kept = {}
    for position in (NormPosition.before, NormPosition.both):
        cfg = tiny_config(n_dense_layers=0)
        cfg.norm.position = position
        module = tiny_model(cfg, activation_checkpointing="selective")
        with LiveMemory() as memory:
            losses = module(batch(4, 64), batch(4, 64))
        kept[position] = memory.bytes_alive()
        del losses
    rows = cfg.n_layers * 4 * 64 * cfg.moe.top_k * cfg.d_model * 4
    assert kept[NormPosition.both] - kept[NormPosition.before] >= 0.99 * rows


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_emulated_bf16_has_the_same_bits_too(mode: str) -> None:
    precision = PrecisionConfig(compute=Compute.bf16_emulated)
    losses, grads = step(model("none", precision=precision))
    other_losses, other_grads = step(model(mode, precision=precision))
    assert torch.equal(losses.total, other_losses.total)
    assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("term", ["balance", "z"])
def test_gate_gradient_of_an_auxiliary_loss_counts_it_once(term: str, mode: str) -> None:
    """Against a finite difference of the loss itself: a loss that is lost or doubled shows as a factor of 0 or 2."""
    module = model(mode, "loop", torch.float64)
    gate = module.layers[2].ffn.router.gate.weight
    getattr(module(batch(), batch()), term).backward()
    direction = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step_size = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            gate.add_(direction, alpha=sign * step_size)
            values.append(getattr(module(batch(), batch()), term).item())
            gate.sub_(direction, alpha=sign * step_size)
    assert (gate.grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step_size), rel=1e-6)


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_full_keeps_less_than_selective_keeps_less_than_none(backend: str) -> None:
    kept = {}
    for mode in MODES:
        module = model(mode, backend)
        with LiveMemory() as memory:
            losses = module(batch(4, 64), batch(4, 64))
        kept[mode] = memory.bytes_alive()
        del losses
    assert kept["full"] < 0.6 * kept["selective"]
    assert kept["selective"] < 0.8 * kept["none"]


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_selective_recomputes_no_product(backend: str) -> None:
    forward, backward = backward_operations("none", backend)
    selective_forward, selective_backward = backward_operations("selective", backend)
    assert products(selective_forward) == products(forward)
    assert products(selective_backward) == products(backward)


def test_selective_recomputes_what_is_cheap() -> None:
    _, backward = backward_operations("none")
    _, selective = backward_operations("selective")
    recomputed = selective - backward
    assert {"silu", "topk", "index_select"} <= recomputed.keys()


def test_full_recomputes_every_product_that_is_read_again_once() -> None:
    forward, backward = backward_operations("none")
    _, full = backward_operations("full")
    recomputed = full - backward
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert recomputed[attention] == forward[attention] > 0
    assert recomputed["_grouped_mm"] == forward["_grouped_mm"] * 2 / 3 > 0  # gate and up, not down
    # Two are the loss's, outside of the blocks; the dense block's last product is needed by no gradient.
    assert recomputed["mm"] == forward["mm"] - 2 - 1


def test_full_recomputes_no_last_product_in_fp8_either() -> None:
    precision = PrecisionConfig(compute=Compute.bf16_emulated, fp8=Fp8Config(recipe=Fp8Recipe.deepseek_v3))
    counts = []
    for mode in MODES:
        module = model(mode, precision=precision)
        with Operations() as forward:
            total = module(batch(), batch()).total
        with Operations() as backward:
            total.backward()
        counts.append((forward.counts["fp8_multiply"], backward.counts["fp8_multiply"]))
    (forth, back), selective, full = counts
    assert selective == (forth, back)
    sparse = 2
    assert full == (forth, back + forth - sparse)


@pytest.mark.parametrize("mode", MODES)
def test_parameter_and_module_names_are_unchanged(mode: str) -> None:
    plain, module = meta_model(tiny_config()), model(mode)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("mode", MODES)
def test_logits_without_grad_are_the_same(mode: str) -> None:
    with torch.no_grad():
        assert torch.equal(model(mode)(batch()), model("none")(batch()))


def test_a_recomputation_that_comes_to_other_sizes_fails() -> None:
    """Rows would go to wrong experts, without an error."""
    sizes = iter([torch.tensor([3, 5]), torch.tensor([4, 4])])

    def block(x: Tensor) -> Tensor:
        first, _ = on_the_host(next(sizes))
        return (x * first).sin()

    x = torch.ones(3, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False, context_fn=keeping_nothing)
    with pytest.raises(RuntimeError, match="a recomputed block routes its tokens otherwise than before"):
        out.sum().backward()


@pytest.mark.parametrize("nested", [False, True])
def test_what_the_host_has_read_is_not_read_again(nested: bool) -> None:
    """Also of a region inside a region, which notes for both."""
    reads = []

    def block(x: Tensor) -> Tensor:
        with mock.patch.object(Tensor, "tolist", lambda sizes: reads.append(sizes) or [len(reads)]):
            [factor] = on_the_host(torch.zeros(1))
        return (x * factor).sin()

    def blocks(x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False, context_fn=keeping_nothing) if nested else block(x)
        return x.cos()

    x = torch.ones(3, requires_grad=True)
    checkpoint(blocks, x, use_reentrant=False, context_fn=keeping_nothing).sum().backward()
    assert len(reads) == 2
    again = torch.ones(3, requires_grad=True)
    (2 * (1 * again).sin()).sin().cos().sum().backward()
    assert torch.equal(x.grad, again.grad)
