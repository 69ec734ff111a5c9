"""Weights: nothing is allocated before ``materialize``, and each tensor depends on the seed and its name alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moefoundry.config import ModelConfig
from moefoundry.model.init import init_weights
from moefoundry.model.norm import RMSNorm
from moefoundry.model.transformer import MoETransformer
from moefoundry.parallel import materialize
from tests.model.tiny import batch, meta_model, tiny_config


class DevicesUsed(TorchDispatchMode):
    """Devices of all tensors that operations return while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.types |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def weights(cfg: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    model = meta_model(cfg)
    materialize(model, "cpu", seed)
    return dict(model.named_parameters())


def test_build_on_meta_allocates_nothing() -> None:
    with DevicesUsed() as used:
        model = meta_model(tiny_config())
    assert used.types == {"meta"}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())  # a buffer would have to be filled after to_empty


def test_materialize_leaves_no_meta_tensor_and_the_model_runs() -> None:
    model = meta_model(tiny_config())
    materialize(model, "cpu", seed=0)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model(batch()).isfinite().all()


def test_weights_on_meta_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^embed_tokens.weight is on the meta device: materialize the model"):
        init_weights(meta_model(tiny_config()), std=0.02, seed=0)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    first, second, other = weights(tiny_config(), 5), weights(tiny_config(), 5), weights(tiny_config(), 6)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, other[name]) == name.endswith("norm.weight")


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    first, state = weights(tiny_config()), torch.get_rng_state()
    torch.manual_seed(2)
    second = weights(tiny_config())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_built_on_the_cpu_gets_the_same_weights() -> None:
    model = MoETransformer(tiny_config())
    init_weights(model, std=tiny_config().init.std, seed=0)
    assert all(torch.equal(p, weights(tiny_config())[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "other", [{"n_layers": 5}, {"num_shared_experts": 0}, {"top_k": 1}, {"n_layers": 1}], ids=lambda d: next(iter(d))
)
def test_a_tensor_does_not_depend_on_the_rest_of_the_model(other: dict) -> None:
    ours, theirs = weights(tiny_config()), weights(tiny_config(**other))
    common = ours.keys() & theirs.keys()
    assert {"embed_tokens.weight", "layers.0.attention.q_proj.weight", "lm_head.weight"} <= common
    assert all(torch.equal(ours[name], theirs[name]) for name in common)


def test_experts_do_not_depend_on_how_many_there_are() -> None:
    more = tiny_config()
    more.moe.num_experts = 7
    name = "layers.1.ffn.experts.gate_proj"
    assert torch.equal(weights(more)[name][:4], weights(tiny_config())[name])


def test_a_parameter_is_drawn_by_its_own_name() -> None:
    class Two(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(8, 4))

    first, second = Two("a", "b"), Two("b", "c")
    for module in (first, second):
        init_weights(module, std=1.0, seed=0)
    assert torch.equal(first.b.weight, second.b.weight)
    assert not torch.equal(first.a.weight, first.b.weight)
    assert first.a.bias.count_nonzero() == 0


def test_no_two_rows_are_the_same() -> None:
    rows = [tuple(row.tolist()) for p in weights(tiny_config()).values() if p.dim() > 1 for row in p.flatten(0, -2)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_norms_are_one_and_matrices_have_the_std_and_mean_zero(std: float) -> None:
    for name, value in weights(tiny_config(std=std)).items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value))
            continue
        # Four standard errors of the sample's std and mean.
        assert value.std().item() == pytest.approx(std, rel=4 / (2 * value.numel()) ** 0.5), name
        assert abs(value.mean().item()) < 4 * std / value.numel() ** 0.5, name


def test_every_norm_of_the_model_is_found_by_its_type() -> None:
    names = {name for name, module in meta_model(tiny_config()).named_modules() if isinstance(module, RMSNorm)}
    assert names == {"norm", *(f"layers.{i}.{kind}_norm" for i in range(3) for kind in ("attention", "ffn"))}


def test_bf16_parameters_are_the_rounded_fp32_ones() -> None:
    model = meta_model(tiny_config()).to(torch.bfloat16)
    materialize(model, "cpu", seed=0)
    exact = weights(tiny_config())
    assert all(torch.equal(p, exact[name].to(torch.bfloat16)) for name, p in model.named_parameters())


MOVES = {
    "materialize": lambda model: None,
    "to_empty_again": lambda model: materialize(model, "cpu", seed=1),
    "double": lambda model: model.double(),
    "to_meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_tied_weights_stay_one_parameter(move) -> None:
    model = meta_model(tiny_config(tie_embeddings=True))
    materialize(model, "cpu", seed=0)
    move(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight


def test_tied_weights_share_storage_and_both_uses_reach_one_gradient() -> None:
    model = meta_model(tiny_config(tie_embeddings=True))
    materialize(model, "cpu", seed=0)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    model(ids, ids).lm.backward()
    # Rows of tokens that never occur as input get their gradient from the head.
    assert (model.embed_tokens.weight.grad.abs().sum(dim=1) > 0).all()


def test_untied_weights_differ() -> None:
    untied = weights(tiny_config(tie_embeddings=False))
    assert not torch.equal(untied["lm_head.weight"], untied["embed_tokens.weight"])
