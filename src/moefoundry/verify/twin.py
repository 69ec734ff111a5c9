"""The twin of a recipe: the same parts, in sizes that a CPU core computes in milliseconds.

Every key of the recipe survives, but for these:

    widths, vocabulary, length   small; their ratios stay where a layer depends on them (query to key heads, windows)
    blocks                       one dense block in front, where there are any, two with experts, and a dense one
                                 between them, where there are such; one module of multi-token prediction
    experts                      4 to 8, divisible by the ranks; groups, top-k and group limits in proportion
    data                         made here, with the same streams, packing and transforms
    length of the run            a few batches; the schedule is in proportion
    what only watches            callbacks, loggers, evaluations, uploads: none
    what cannot be had here      kernels of another device, compilation
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from moefoundry.config import (
    AttentionConfig,
    CallbacksConfig,
    ConfigError,
    Dispatcher,
    Fp8Config,
    GqaConfig,
    LinearAttentionConfig,
    LoaderConfig,
    LoggersConfig,
    LoraConfig,
    MeshConfig,
    MlaConfig,
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
    Recipe,
    SchedulerConfig,
    SparseMixerConfig,
    WarmupConfig,
    check_recipe,
)
from moefoundry.config.schema_curriculum import StageConfig

LENGTH, VOCABULARY, WIDTH = 48, 512, 64
HEAD_WIDTHS = (16, 24, 32, 48, 64, 96, 128)
ROWS, BATCHES = 8, 7
"""Sequences of a global batch, and batches of a run: more than an epoch of the data that are made."""
SAVED_EVERY = 2
KERNELS = ("triton", "megablocks", "quack")


@dataclass(frozen=True)
class Twin:
    """A shrunk recipe.

    Attributes:
        recipe: The twin.
        original: The recipe itself.
        ranks: Ranks of the largest world that is tried, a power of 2.
        gpu: Ranks compute on GPUs.
        room: Directory for its data, runs and checkpoints.
        lost: Keys of the recipe whose effect the twin does not have, with the reason.
    """

    recipe: Recipe
    original: Recipe
    ranks: int
    gpu: bool
    room: Path
    lost: tuple[str, ...]

    def __str__(self) -> str:
        model, moe = self.recipe.model, self.recipe.model.moe
        dense = model.n_dense_layers + len(model.dense_layers)
        return (
            f"{model.n_layers} blocks ({dense} dense), d_model {model.d_model}, {model.attention.kind} with "
            f"{model.attention.n_heads} heads, {moe.num_experts} experts top-{moe.top_k}, "
            f"{ROWS} x {self.recipe.max_seq_len} tokens a batch"
        )


def make_twin(recipe: Recipe, room: Path, ranks: int = 4, gpu: bool = False) -> Twin:
    """Shrink a recipe; the arguments are those of :class:`Twin`.

    Raises:
        ConfigError: What is left is no recipe: its parts fit no small sizes.
    """
    length, model = min(recipe.max_seq_len, LENGTH), small_model(recipe, ranks)
    lost = [f"compile: {recipe.compile}"] if recipe.compile else []
    if recipe.model.moe.backend != model.moe.backend:
        lost.append(f"model.moe.backend: {recipe.model.moe.backend}; {model.moe.backend} takes its place")
    if recipe.model.moe.dispatcher != model.moe.dispatcher:
        lost.append(f"model.moe.dispatcher: {recipe.model.moe.dispatcher}; {model.moe.dispatcher} takes its place")
    if recipe.precision.fp8.backend != (fp8 := small_fp8(recipe.precision.fp8, model)).backend:
        lost.append(f"precision.fp8.backend: {recipe.precision.fp8.backend}; the definitions take its place")
    twin = replace(
        recipe,
        run_name="twin",
        run_dir=str(room / "run"),
        max_seq_len=length,
        model=model,
        lora=recipe.lora and small_lora(recipe.lora),
        mesh=MeshConfig(),
        precision=replace(recipe.precision, fp8=fp8),
        compile=False,
        tokenizer=replace(recipe.tokenizer, name=str(room / "data" / "tokenizer")),
        curriculum=recipe.curriculum and small_curriculum(recipe.curriculum, recipe.max_seq_len),
        train_loader=small_loader(recipe.train_loader, room / "data", length),
        eval_loader=None,
        ema=recipe.ema and replace(recipe.ema, evaluate=False),
        scheduler=small_schedule(recipe.scheduler),
        callbacks=CallbacksConfig(None, None, None, None, None),
        loggers=LoggersConfig(),
        max_duration=f"{BATCHES}ba",
        eval_interval=f"{10**6}ba",
        global_train_batch_size=ROWS,
        device_train_microbatch_size=1,
        save_interval=f"{SAVED_EVERY}ba",
        save_async=False,
        save_num_checkpoints_to_keep=-1,
        save_keep_every=None,
        save_keep_best=None,
        save_remote=None,
        load_path=None if recipe.lora is None else str(room / "base"),
        load_weights_only=False,
        allow_batch_size_change=False,
        autoresume=False,
        dist_timeout=60.0,
        progress_bar=False,
        log_to_console=False,
        icl_tasks=None,
        eval_gauntlet=None,
    )
    if problems := check_recipe(twin):
        raise ConfigError(problems, f"the twin of {recipe.run_name}")
    return Twin(twin, recipe, ranks, gpu, room, tuple(lost))


def small_model(recipe: Recipe, ranks: int) -> ModelConfig:
    """Shrink the model."""
    model = recipe.model
    blocks = kept_blocks(model)
    attention, width = small_attention(model.attention, model.d_model, recipe.max_seq_len)
    attention = with_windows_of(attention, blocks)
    return replace(
        model,
        vocab_size=VOCABULARY,
        d_model=width,
        n_layers=len(blocks),
        n_dense_layers=sum(index < model.n_dense_layers for index in blocks),
        dense_layers=places_of(model.dense_layers, [*range(model.n_dense_layers)], blocks),
        ffn_hidden_size=model.ffn_hidden_size and 96,
        init=replace(model.init, std=min(100.0, model.init.std * math.sqrt(model.d_model / width))),
        attention=attention,
        linear_attention=model.linear_attention and small_linear(model.linear_attention, blocks),
        moe=small_moe(model.moe, ranks),
        mtp=replace(model.mtp, depth=min(model.mtp.depth, 1)),
    )


def kept_blocks(model: ModelConfig) -> list[int]:
    """Choose a block of each kind, the first, and a second one with experts."""
    kinds = [kind_of(model, index) for index in range(model.n_layers)]
    kept = {kinds.index(kind) for kind in kinds}
    with_experts = [index for index in range(model.n_layers) if not model.is_dense(index)]
    return sorted(kept | set(with_experts[:2]))


def kind_of(model: ModelConfig, index: int) -> tuple[object, ...]:
    """Describe a block by all in which it may differ from others."""
    attention = model.attention
    seen = attention.window_of(index), attention.is_rotated(index)
    return (index < model.n_dense_layers, model.is_dense(index), *seen, model.is_linear(index))


def places_of(listed: list[int], besides: list[int], kept: list[int]) -> list[int]:
    """Give the places among the kept blocks of those listed, but for some that are not to be listed."""
    return [place for place, index in enumerate(kept) if index in listed and index not in besides]


def small_attention(attention: AttentionConfig, d_model: int, length: int) -> tuple[AttentionConfig, int]:
    """Shrink attention; give the width of the residual stream, too."""
    if isinstance(attention, MlaConfig):
        rank = attention.q_lora_rank and 24
        latent = replace(attention, n_heads=min(attention.n_heads, 4), q_lora_rank=rank, kv_lora_rank=24)
        if (indexer := attention.indexer) is not None:
            kept = max(1, round(indexer.top_k * min(length, LENGTH) / length))
            latent = replace(latent, indexer=replace(indexer, top_k=kept, n_heads=2, head_dim=16))
        return replace(latent, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16), WIDTH
    if not isinstance(attention, GqaConfig):
        return attention, d_model  # of a package; its keys are its own
    kv_heads = min(attention.n_kv_heads, 2)
    heads = kv_heads * min(attention.n_heads // attention.n_kv_heads, 2)
    turned = attention.rotary_fraction
    head = next((width for width in HEAD_WIDTHS if (part := int(width * turned)) and part % 2 == 0), None)
    head = head or attention.head_width(d_model)
    window = attention.sliding_window
    if window is not None and window < length:
        window = max(2, round(window * min(length, LENGTH) / length))
    explicit = attention.head_dim is not None
    small = replace(attention, n_heads=heads, n_kv_heads=kv_heads, sliding_window=window)
    return replace(small, head_dim=head if explicit else None), WIDTH if explicit else heads * head


def with_windows_of(attention: AttentionConfig, blocks: list[int]) -> AttentionConfig:
    """Give the kept blocks the windows and rotary embeddings that they had."""
    if not isinstance(attention, GqaConfig):
        return attention
    layers, unrotated = attention.sliding_window_layers, places_of(attention.unrotated_layers, [], blocks)
    windowed = None if layers is None else places_of(layers, [], blocks)
    return replace(attention, sliding_window_layers=windowed, unrotated_layers=unrotated)


def small_linear(linear: LinearAttentionConfig, blocks: list[int]) -> LinearAttentionConfig:
    """Shrink linear attention, of the kept blocks that have it."""
    heads = min(linear.n_key_heads, 2)
    return replace(
        linear,
        layers=[place for place, index in enumerate(blocks) if linear.is_linear(index)],
        n_key_heads=heads,
        n_value_heads=heads * min(linear.n_value_heads // linear.n_key_heads, 2),
        key_head_dim=16,
        value_head_dim=16,
    )


def small_moe(moe: MoEConfig, ranks: int) -> MoEConfig:
    """Shrink the experts: few, divisible by the ranks, and as limited in their groups as before."""
    groups, kept = min(moe.router.num_groups, 4), moe.router.top_k_groups
    if groups > 1:
        kept = groups if kept == moe.router.num_groups else min(kept, groups // 2)
        size = next(size for size in range(2, 2 * ranks + 2) if groups * size % ranks == 0)
        experts, reachable = groups * size, kept * size
    else:
        experts = reachable = max(ranks, min(moe.num_experts, 8) // ranks * ranks)
    top_k = experts if moe.top_k == moe.num_experts else min(moe.top_k, max(1, reachable // 2))
    return replace(
        moe,
        num_experts=experts,
        top_k=top_k,
        expert_hidden_size=32,
        num_shared_experts=min(moe.num_shared_experts, 2),
        router=replace(moe.router, num_groups=groups, top_k_groups=kept),
        balance=replace(moe.balance, bias_freeze_at=moe.balance.bias_freeze_at and f"{BATCHES - 2}ba"),
        backend="auto" if moe.backend in KERNELS else moe.backend,
        dispatcher=Dispatcher.all_to_all,
    )


def small_lora(lora: LoraConfig) -> LoraConfig:
    """Shrink adapters; their scale stays."""
    rank = min(lora.rank, 8)
    power = 0.5 if lora.use_rslora else 1.0
    return replace(lora, rank=rank, alpha=lora.alpha * (rank / lora.rank) ** power, base=None)


def small_fp8(fp8: Fp8Config, model: ModelConfig) -> Fp8Config:
    """Leave out names of modules that the twin lacks, and kernels."""
    if fp8.recipe is None:
        return fp8

    from moefoundry.model.transformer import meta_model

    names = [name for name, _ in meta_model(model).named_modules()]
    exclude = [pattern for pattern in fp8.exclude if any(fnmatchcase(name, pattern) for name in names)]
    return replace(fp8, exclude=exclude, backend=None)


def small_loader(loader: LoaderConfig, data: Path, length: int) -> LoaderConfig:
    """Read data that are made here, by the same rules."""
    dataset = loader.dataset
    streams = dataset.streams and {
        name: replace(
            each, local=str(data / name), remote=None, split=None, choose=each.choose and min(each.choose, 24)
        )
        for name, each in dataset.streams.items()
    }
    first = next(iter(streams.values())).local if streams else str(data / "corpus")
    fim = dataset.fim and replace(dataset.fim, sentinels=None)
    dataset = replace(dataset, local=first, remote=None, split="train", max_seq_len=length, streams=streams, fim=fim)
    return replace(loader, dataset=dataset, drop_last=True, num_workers=0)


def small_curriculum(curriculum: dict[str, StageConfig], length: int) -> dict[str, StageConfig]:
    """Shorten stages to two batches each, with their lengths in proportion; the last goes on to the end."""
    stages = {}
    for number, (name, stage) in enumerate(curriculum.items(), start=1):
        rows = stage.max_seq_len and max(8, round(stage.max_seq_len * min(length, LENGTH) / length) // 8 * 8)
        stages[name] = replace(
            stage,
            until=stage.until and f"{2 * number}ba",
            max_seq_len=rows,
            global_train_batch_size=None,
            device_train_microbatch_size=None,
        )
    return stages


def small_schedule(scheduler: SchedulerConfig) -> SchedulerConfig:
    """Begin with as much of a warm-up as the run has room for."""
    return replace(scheduler, t_warmup="0.25dur") if isinstance(scheduler, WarmupConfig) else scheduler


def exact(recipe: Recipe) -> Recipe:
    """Compute in fp32, without what is drawn anew on every rank: what is left must be equal, to rounding."""
    recipe = without_draws(recipe)
    return replace(recipe, precision=PrecisionConfig())


def without_draws(recipe: Recipe) -> Recipe:
    """Leave out jitter, sampled experts and dropout, which draw other numbers on other ranks."""
    router = replace(recipe.model.moe.router, input_jitter=0.0)
    if isinstance(router, SparseMixerConfig):
        router = replace(router, sampled=False)
    model = replace(recipe.model, moe=replace(recipe.model.moe, router=router))
    return replace(recipe, model=model, lora=recipe.lora and replace(recipe.lora, dropout=0.0))
