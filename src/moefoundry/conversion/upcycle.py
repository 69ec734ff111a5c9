"""Sparse upcycling of a dense model into a mixture of experts that computes the same.

Each expert is a copy of the dense FFN (arXiv 2212.05055). With granularity G it is a slice: the FFN's hidden units are
cut into G parts of equal width, and experts ``g * G`` to ``g * G + G - 1`` are the slices of copy ``g`` (arXiv
2410.07524). The router's rows within a copy start out equal, that paper's virtual groups, so that a token's experts are
``top_k / G`` whole copies, weighted alike within each. The weights of the top k sum to 1, so each slice counts 1 / G,
and ``router.scale`` G makes it count once: logits are the dense model's until training begins.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import ShardValues
from moefoundry.checkpoint.store import TOKENIZER
from moefoundry.config import ModelConfig, MoEConfig, RouterConfig, UserError
from moefoundry.conversion.convert import Summary, nbytes_of, say, write_recipe, write_weights
from moefoundry.conversion.families import FAMILIES, exports_as, nearest_family
from moefoundry.conversion.families.family import dense_layers, with_dense_layers
from moefoundry.conversion.hf_directory import HfDirectory, open_hf
from moefoundry.conversion.tensor_map import Dtype
from moefoundry.data.staging import staged
from moefoundry.data.tokenizer_files import check_importable, import_tokenizer
from moefoundry.model.transformer import meta_model

HIDDEN_DIM = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}  # of the dense FFN's weights


@dataclass(frozen=True)
class Upcycling:
    """Shape of the mixture.

    Attributes:
        num_experts: Experts of each layer; a multiple of ``granularity``.
        top_k: Experts of each token; a multiple of ``granularity``.
        granularity: Slices of the FFN; divides its hidden size.
        layers: Indices of the blocks that get experts; None is all.
        noise: Standard deviation of the noise added to each expert weight. With any, experts differ from the start, and
            logits from the dense model's.
        seed: Seed of router and noise.
    """

    num_experts: int
    top_k: int
    granularity: int = 1
    layers: frozenset[int] | None = None
    noise: float = 0.0
    seed: int = 17

    def config(self, dense: ModelConfig) -> ModelConfig:
        """Build the config of the mixture that ``dense`` becomes.

        Raises:
            UserError: Names every option that does not fit it.
        """
        layers = frozenset(range(dense.n_layers)) if self.layers is None else self.layers
        hidden, slices = dense.ffn_hidden_size or 0, self.granularity
        rules = [
            (dense_layers(dense) != list(range(dense.n_layers)), "the model has experts already"),
            (slices < 1 or hidden % max(1, slices) != 0, f"granularity={slices} does not divide the FFN's {hidden}"),
            (
                self.num_experts < 1 or self.num_experts % max(1, slices) != 0,
                f"num_experts={self.num_experts} is no positive multiple of granularity={slices}",
            ),
            (
                not 1 <= self.top_k <= self.num_experts or self.top_k % max(1, slices) != 0,
                f"top_k={self.top_k} is no multiple of granularity={slices} up to num_experts={self.num_experts}",
            ),
            (
                not layers <= set(range(dense.n_layers)),
                f"layers={sorted(layers)}: there are 0 to {dense.n_layers - 1}",
            ),
            (not 0 <= self.noise < math.inf, f"noise={self.noise} is no standard deviation"),
        ]
        if problems := [text for broken, text in rules if broken]:
            raise UserError("cannot upcycle: " + "; ".join(problems))
        moe = MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_hidden_size=hidden // slices,
            num_shared_experts=0,
            router=RouterConfig(normalize_topk=True, scale=float(slices)),
        )
        return with_dense_layers(replace(dense, moe=moe), [i for i in range(dense.n_layers) if i not in layers])


def upcycle(hf: Path, output: Path, options: Upcycling, dtype: Dtype = Dtype.keep) -> Summary:
    """Write a weights-only checkpoint of a mixture of experts made from a dense Hugging Face model.

    Args:
        hf: Directory with config.json and safetensors of a dense model.
        output: Checkpoint directory to make.
        options: Shape of the mixture.
        dtype: Type of the stored parameters.

    Raises:
        UserError: As :func:`~moefoundry.conversion.hf_directory.open_hf` and :meth:`Upcycling.config`; or ``output``
            exists or cannot be written.
    """
    source = open_hf(hf, dtype.torch)
    cfg = options.config(source.cfg)
    dense = source.names.our_specs(source.tensors.specs, dtype)
    specs = {
        name: TensorSpec(tuple(tensor.shape), dense[_dense_name(name)].dtype)
        for name, tensor in meta_model(cfg).state_dict().items()
    }
    tokenizer = check_importable(hf)
    say(*source.notes, *_of_the_export(cfg))
    with staged(output, nbytes_of(specs)) as staging:
        staging.mkdir()
        blocks = _blocks(source, options, dense, specs)
        write_weights(staging, cfg, specs, blocks, source.max_seq_len)
        write_recipe(staging, cfg, source, output)
        import_tokenizer(hf, staging / TOKENIZER)
    return Summary(output, len(specs), nbytes_of(specs), tokenizer)


def _of_the_export(cfg: ModelConfig) -> list[str]:
    """Say what an export is, or that there is none, where it is not plainly a family."""
    found = exports_as(cfg)
    if found in FAMILIES:
        return []
    if "no Hugging Face family" not in found:
        return [f"the mixture is exported as {found}"]
    family, reasons = nearest_family(cfg)
    nearest = f"nearest is {family.name}: " if family is not None else ""
    return [
        "the mixture can be trained and not exported: no Hugging Face family computes what it does; "
        f"{nearest}{'; '.join(reasons)}"
    ]


def _dense_name(name: str) -> str:
    """Name the dense model's tensor whose dtype ours takes; for an expert's, the tensor that it is a part of."""
    layer, _, part = name.partition(".ffn.")
    if part.startswith("experts."):
        return f"{layer}.ffn.{part.removeprefix('experts.')}.weight"
    return f"{layer}.ffn.gate_proj.weight" if part.startswith("router.") else name


def _blocks(
    source: HfDirectory, options: Upcycling, dense: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]
) -> Iterator[ShardValues]:
    kept = {name: spec for name, spec in dense.items() if name in specs}
    yield from source.names.our_blocks(source.tensors, kept)
    for name, spec in specs.items():
        if name in kept:
            continue
        if name.endswith("router.gate.weight"):
            yield ShardValues(name, (0, 0), _router(name, spec, options, source.cfg.init.std))
        else:
            yield from _experts(name, spec, options, source, dense)


def _router(name: str, spec: TensorSpec, options: Upcycling, std: float) -> Tensor:
    """Draw the gate, [E, D]: a random row for each copy of the FFN, the same for its slices."""
    rows = torch.empty(spec.shape[0] // options.granularity, spec.shape[1])
    rows.normal_(0.0, std, generator=_generator(options.seed, name))
    return rows.repeat_interleave(options.granularity, dim=0).to(spec.dtype)


def _experts(
    name: str, spec: TensorSpec, options: Upcycling, source: HfDirectory, dense: Mapping[str, TensorSpec]
) -> Iterator[ShardValues]:
    """Yield the experts of one stacked weight; the dense one is whole in memory meanwhile."""
    dense_name = _dense_name(name)
    whole = torch.empty(dense[dense_name].shape, dtype=spec.dtype)
    for block in source.names.our_blocks(source.tensors, {dense_name: dense[dense_name]}):
        block.box_of(whole).copy_(block.values)
    slices = whole.chunk(options.granularity, dim=HIDDEN_DIM[name.rpartition(".")[2]])
    for expert in range(spec.shape[0]):
        values = slices[expert % options.granularity]
        if options.noise:
            generator = _generator(options.seed, f"{name}/{expert}")
            values = values + torch.empty(values.shape).normal_(0.0, options.noise, generator=generator)
        yield ShardValues(name, (expert, 0, 0), values.to(spec.dtype).unsqueeze(0))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"upcycle/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
