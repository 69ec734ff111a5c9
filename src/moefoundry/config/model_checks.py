"""Rules between the keys of a model and of its precision. Each names its keys and is a plain function of the recipe."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.attention_rules import indexer_problems, rope_problems, window_problems
from moefoundry.config.errors import Problem
from moefoundry.config.linear_attention_rules import linear_attention_problems
from moefoundry.config.mesh_rules import divisors
from moefoundry.config.router_rules import picking_problems
from moefoundry.config.rule import rule
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_attention import GqaConfig, MlaConfig
from moefoundry.config.schema_model import Dispatcher
from moefoundry.config.schema_parts import (
    Compute,
    Fp8Backend,
    Fp8Config,
    Fp8Recipe,
)
from moefoundry.config.spec import describe, every_key, missing, show_leaf

EVEN = "an even width, which rotary embeddings need"


@rule("model.moe.top_k", "model.moe.num_experts")
def _top_k(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    moe = recipe.model.moe
    if moe.top_k > moe.num_experts:
        message = f"{moe.top_k} experts for each token, but model.moe.num_experts is {moe.num_experts}"
        yield Problem("model.moe.top_k", message, allowed=f"1 to {moe.num_experts}")


@rule("model.moe.router", "model.moe.balance.bias_update_rate")
def _picking(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    yield from picking_problems(recipe.model.moe)


@rule("model.moe.top_k", "model.moe.num_experts", "model.moe.router", "model.moe.balance.bias_update_rate")
def _expert_groups(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Group-limited routing must leave every token enough experts."""
    moe, router = recipe.model.moe, recipe.model.moe.router
    groups, kept = router.num_groups, router.top_k_groups
    if moe.num_experts % groups:
        message = f"model.moe.num_experts {moe.num_experts} is not divisible by {groups}"
        yield Problem("model.moe.router.num_groups", message, allowed=divisors(moe.num_experts))
        return
    if kept > groups:
        message = f"{kept} groups for each token, but model.moe.router.num_groups is {groups}"
        yield Problem("model.moe.router.top_k_groups", message, allowed=f"1 to {groups}")
        return
    size = moe.num_experts // groups
    if groups > 1 and size < moe.group_votes:
        message = f"{groups} groups of one expert, but with an expert bias a group is judged by its best two"
        yield Problem("model.moe.router.num_groups", message, allowed="groups of at least two experts")
    if kept * size < moe.top_k <= moe.num_experts:
        message = f"{kept} of model.moe.router.num_groups, {groups}, have {kept * size} experts, "
        message += f"fewer than model.moe.top_k, {moe.top_k}"
        yield Problem("model.moe.router.top_k_groups", message, allowed=f"{-(-moe.top_k // size)} to {groups}")


@rule("model.mtp.depth", "max_seq_len")
def _mtp_depth(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    depth, seq_len = recipe.model.mtp.depth, recipe.max_seq_len
    if depth > seq_len - 2:
        message = f"depth {depth} predicts {depth + 1} tokens ahead, in samples of max_seq_len {seq_len}"
        yield Problem("model.mtp.depth", message, allowed=f"0 to {seq_len - 2}")


@rule("model.n_dense_layers", "model.dense_layers", "model.n_layers")
def _dense_layers(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    model = recipe.model
    if model.n_dense_layers > model.n_layers:
        message = f"{model.n_dense_layers} dense layers, but model.n_layers is {model.n_layers}"
        yield Problem("model.n_dense_layers", message, allowed=f"0 to {model.n_layers}")
    if beyond := [index for index in model.dense_layers if index >= model.n_layers]:
        message = f"no block {', '.join(map(str, beyond))}, for model.n_layers is {model.n_layers}"
        yield Problem("model.dense_layers", message, allowed=f"0 to {model.n_layers - 1}")


@rule("model.ffn_hidden_size", "model.n_dense_layers", "model.dense_layers")
def _dense_width(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    model, spec = recipe.model, every_key()["model.ffn_hidden_size"]
    if model.ffn_hidden_size is None and (model.n_dense_layers or model.dense_layers):
        yield Problem("model.ffn_hidden_size", missing(spec), allowed=describe(spec).removesuffix(", or null"))


@rule("model.d_model", "model.attention")
def _heads(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    width, attention = recipe.model.d_model, recipe.model.attention
    if not isinstance(attention, GqaConfig):
        return
    path, heads = "model.attention.n_heads", attention.n_heads
    if attention.head_dim is not None:
        if attention.head_dim % 2:
            yield Problem("model.attention.head_dim", f"{attention.head_dim} is odd", allowed=EVEN)
    elif width % heads:
        yield Problem(path, f"model.d_model {width} is not divisible by {heads} heads", allowed=divisors(width))
    elif (width // heads) % 2:
        message = f"the head width model.d_model / n_heads = {width} / {heads} = {width // heads} is odd"
        yield Problem(path, message, allowed=EVEN)
    if attention.rotary_fraction < 1 and (turned := attention.rotary_dim(width)) % 2 | (turned == 0):
        message = f"{attention.rotary_fraction} of a head of {attention.head_width(width)} is {turned}"
        yield Problem("model.attention.rotary_fraction", message, allowed=EVEN)
    if heads % attention.n_kv_heads:
        message = f"n_heads {heads} is not divisible by {attention.n_kv_heads} key-value heads"
        yield Problem("model.attention.n_kv_heads", message, allowed=divisors(heads))


@rule("model.linear_attention", "model.n_layers")
def _linear_attention(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    yield from linear_attention_problems(recipe.model)


@rule("model.moe.shared_expert_gate", "model.moe.num_shared_experts")
def _gate_of_nothing(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    if recipe.model.moe.shared_expert_gate and not recipe.model.moe.num_shared_experts:
        message = "true, but model.moe.num_shared_experts is 0"
        yield Problem("model.moe.shared_expert_gate", message, allowed="false")


@rule("model.attention", "model.n_layers")
def _windows(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    yield from window_problems(recipe.model)


@rule("model.attention", "model.linear_attention", "model.n_layers", "model.mtp.depth", "lora", "ema")
def _indexers(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    yield from indexer_problems(recipe)


@rule("model.attention", "model.d_model")
def _rotations(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    attention = recipe.model.attention
    if isinstance(attention, MlaConfig) and attention.qk_rope_head_dim % 2:
        yield Problem("model.attention.qk_rope_head_dim", f"{attention.qk_rope_head_dim} is odd", allowed=EVEN)
    if isinstance(attention, MlaConfig) and attention.indexer is not None:
        if attention.q_lora_rank is None:
            yield Problem("model.attention.q_lora_rank", "null, and model.attention.indexer is on", allowed="a width")
        if attention.indexer.head_dim < attention.qk_rope_head_dim:
            message = f"{attention.indexer.head_dim} is less than qk_rope_head_dim, {attention.qk_rope_head_dim}"
            yield Problem("model.attention.indexer.head_dim", message, allowed=f">= {attention.qk_rope_head_dim}")
    yield from rope_problems(recipe.model)


@rule("model.d_model", "model.moe.expert_hidden_size", "model.moe.backend", "precision.compute")
def _grouped_mm_strides(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """``torch.nn.functional.grouped_mm`` and others want strides that are multiples of 16 bytes."""
    backend = "grouped_mm" if recipe.model.moe.backend == "auto" else recipe.model.moe.backend
    if backend not in ("grouped_mm", "triton", "quack"):
        return
    multiple = 8 if recipe.precision.compute == Compute.bf16 else 4
    hidden = recipe.model.moe.expert_hidden_size
    for path, size in (("model.d_model", recipe.model.d_model), ("model.moe.expert_hidden_size", hidden)):
        if size % multiple:
            message = f"the {backend} backend needs rows of whole 16 bytes, but {size} is not divisible by {multiple}"
            allowed = f"multiples of {multiple} with precision.compute={recipe.precision.compute}"
            yield Problem(path, message, allowed, suggestion="model.moe.backend=loop")


@rule("model.d_model", "model.moe.expert_hidden_size", "model.moe.backend", "precision")
def _blocks_of_megablocks(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Its matrices consist of blocks of 128 x 128, which are multiplied as they are."""
    moe, precision = recipe.model.moe, recipe.precision
    if moe.backend != "megablocks":
        return
    for path, size in {"d_model": recipe.model.d_model, "moe.expert_hidden_size": moe.expert_hidden_size}.items():
        if size % 128:
            message = f"model.moe.backend=megablocks multiplies blocks of 128 x 128, but {size} is not divisible by 128"
            yield Problem(f"model.{path}", message, "multiples of 128", suggestion="model.moe.backend=auto")
    for path, chosen in {"fp8.recipe": precision.fp8.recipe, "compute": precision.compute}.items():
        if chosen in (*Fp8Recipe, Compute.bf16_emulated):
            message = f"megablocks has no products for precision.{path}={chosen}"
            yield Problem("model.moe.backend", message, "auto, grouped_mm, loop")


@rule("model.moe.backend", "precision.compute")
def _products_of_quack(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    compute = recipe.precision.compute
    if recipe.model.moe.backend == "quack" and compute != Compute.bf16:
        message = f"quack multiplies BF16, but precision.compute is {compute}"
        yield Problem("model.moe.backend", message, "auto, grouped_mm, loop", suggestion="precision.compute=bf16")


@rule("model.moe.dispatcher", "precision.compute")
def _rows_of_deepep(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    compute = recipe.precision.compute
    if recipe.model.moe.dispatcher == Dispatcher.deepep and compute != Compute.bf16:
        message = f"deepep moves BF16, but precision.compute is {compute}"
        yield Problem("model.moe.dispatcher", message, "all_to_all", suggestion="precision.compute=bf16")


@rule("precision.fp8")
def _fp8_is_on(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    """Refuse keys on how FP8 is done where it is off."""
    fp8, default = recipe.precision.fp8, Fp8Config()
    for name in ("exclude", "backend", "fsdp_all_gather"):
        given, usual = getattr(fp8, name), getattr(default, name)
        if fp8.recipe is None and given != usual:
            message = f"{show_leaf(given)} has no effect while precision.fp8.recipe is null"
            yield Problem(f"precision.fp8.{name}", message, allowed=show_leaf(usual))


@rule("precision.fp8.recipe", "precision.fp8.backend")
def _kernels_of_fp8(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    fp8 = recipe.precision.fp8
    if fp8.recipe in (Fp8Recipe.tensorwise, Fp8Recipe.rowwise) and fp8.backend not in (None, Fp8Backend.reference):
        message = f"recipe {fp8.recipe} is there to compare accuracy, and has no kernels"
        yield Problem("precision.fp8.backend", message, allowed="null, reference")


@rule("precision.fp8", "lora")
def _gathers_in_fp8(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    path, fp8 = "precision.fp8.fsdp_all_gather", recipe.precision.fp8
    if not fp8.fsdp_all_gather:
        return
    if fp8.recipe in (Fp8Recipe.tensorwise, Fp8Recipe.rowwise):
        yield Problem(path, f"recipe {fp8.recipe} has no blocks of weights", "false", suggestion=f"{path}=false")
    if recipe.lora is not None:
        yield Problem(path, "adapters read the weights that FSDP gathers", "false", suggestion=f"{path}=false")


@rule("model.d_model", "model.moe.expert_hidden_size", "precision", "lora")
def _products_of_deepgemm(recipe: Recipe, _: int | None) -> Iterator[Problem]:
    path, precision, width = "precision.fp8.backend", recipe.precision, recipe.model.d_model
    if precision.fp8.recipe != Fp8Recipe.deepseek_v3 or precision.fp8.backend != Fp8Backend.deepgemm:
        return
    if precision.compute != Compute.bf16:
        message = f"deepgemm gives BF16, but precision.compute is {precision.compute}"
        yield Problem(path, message, "null, triton, reference", suggestion="precision.compute=bf16")
    if recipe.lora is not None and any(target.split(".")[0] == "experts" for target in recipe.lora.targets):
        yield Problem(path, "deepgemm has no place for adapters of experts", "null, triton, reference")
    for name, size in {"d_model": width, "moe.expert_hidden_size": recipe.model.moe.expert_hidden_size}.items():
        if size % 16:
            message = f"deepgemm needs rows of whole 16 bytes, but {size} is not divisible by 16"
            yield Problem(f"model.{name}", message, "multiples of 16", suggestion=f"{path}=triton")
