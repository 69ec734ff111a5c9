"""Rules between the keys of ``model.attention`` and the rest of a model."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_attention import GqaConfig, IndexerStage
from moefoundry.config.schema_model import ModelConfig

PATH = "model.attention"
EXTENSIONS = ("yarn", "llama3_rope", "longrope")


def window_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with the blocks that have a sliding window, or have no rotary embedding."""
    attention = model.attention
    if not isinstance(attention, GqaConfig):
        return
    if attention.sliding_window_rope_theta is not None and attention.sliding_window is None:
        path = f"{PATH}.sliding_window_rope_theta"
        yield Problem(path, f"on, and {PATH}.sliding_window is null", allowed="null")
    yield from _blocks_beyond(model, "unrotated_layers", attention.unrotated_layers)
    if (blocks := attention.sliding_window_layers) is None:
        return
    path = f"{PATH}.sliding_window_layers"
    if attention.sliding_window is None:
        yield Problem(path, f"lists blocks, but {PATH}.sliding_window is null", allowed="null")
    elif not blocks:
        yield Problem(path, "no block", allowed="null for all", suggestion=f"{PATH}.sliding_window=null")
    else:
        yield from _blocks_beyond(model, "sliding_window_layers", blocks)


def _blocks_beyond(model: ModelConfig, key: str, blocks: list[int]) -> Iterator[Problem]:
    if beyond := [index for index in blocks if index >= model.n_layers]:
        message = f"no block {', '.join(map(str, beyond))}, for model.n_layers is {model.n_layers}"
        yield Problem(f"{PATH}.{key}", message, allowed=f"0 to {model.n_layers - 1}")


def indexer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with the training of an indexer."""
    trained = recipe.model.attention.trained_indexer
    if trained is None:
        return
    path, model = f"{PATH}.indexer.stage", recipe.model
    if not model.mtp.depth and all(model.is_linear(index) for index in range(model.n_layers)):
        yield Problem(path, f"{trained.stage}, and every block has linear attention", allowed="frozen")
    if recipe.lora is not None:
        yield Problem(path, f"{trained.stage}, and lora leaves all but adapters as it is", allowed="frozen")
    if recipe.ema is not None and trained.stage == IndexerStage.warm_up:
        yield Problem("ema", f"on, and {path}={trained.stage} changes no weight but the indexers'", allowed="null")


def rope_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with extensions of rotary embeddings."""
    attention, pairs = model.attention, model.attention.rotary_dim(model.d_model) // 2
    yarn, bands, longrope = attention.yarn, attention.llama3_rope, attention.longrope
    given = [name for name in EXTENSIONS if getattr(attention, name) is not None]
    if len(given) > 1:
        yield Problem(f"{PATH}.{given[1]}", f"on, and {PATH}.{given[0]} is on, too", allowed="one of them")
    if bands is not None and bands.high_freq_factor <= bands.low_freq_factor:
        message = f"{bands.high_freq_factor} is not more than low_freq_factor, {bands.low_freq_factor}"
        yield Problem(f"{PATH}.llama3_rope.high_freq_factor", message, allowed=f"above {bands.low_freq_factor}")
    if yarn is not None and yarn.beta_fast < yarn.beta_slow:  # of Kimi K2 they are equal
        message = f"{yarn.beta_fast} rotations are fewer than {PATH}.yarn.beta_slow, {yarn.beta_slow}"
        yield Problem(f"{PATH}.yarn.beta_fast", message, allowed=f"at least {yarn.beta_slow}")
    for name in () if longrope is None else ("short_factors", "long_factors"):
        if (count := len(getattr(longrope, name))) != pairs:
            message = f"{count} factors, and {pairs} pairs of a head turn"
            yield Problem(f"{PATH}.longrope.{name}", message, allowed=f"a list of {pairs}")
