"""Check the checkpoint that a run begins with: whether the run may use it, and how much of it.

A run *goes on* from a checkpoint of its own (``autoresume``), or from another run's (``load_path``): optimizer,
counters and position in the data come along, so the data must be the same, by content. With ``load_weights_only`` it
begins a new *phase* with another's weights, and all else from the beginning, on any data.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.base import Base
from moefoundry.checkpoint.manifest import BASE, WEIGHTS_ONLY, read_state
from moefoundry.config import Moments, Recipe, UserError, flatten
from moefoundry.config.curriculum import KEY as CURRICULUM
from moefoundry.config.curriculum import past_of, stage_at, stages_of_flat
from moefoundry.config.schema_data import StreamConfig
from moefoundry.config.spec import is_architecture, is_free_on_resume, show_leaf
from moefoundry.config.versions import without_effect
from moefoundry.data.fit import directory_of, sources_of
from moefoundry.data.identity import INDEX_FILE, read_shards, stream_digest
from moefoundry.data.reference import reference_beside
from moefoundry.data.tokenizer import declared_token

INDEXER = "model.attention.indexer"
MOMENTS = "precision.optimizer_moments"
OPTIMIZER, MUON = "optimizer.name", "muon"
SHUFFLE_SEED = "train_loader.dataset.shuffle_seed"
TRAINING_DATA = "train_loader.dataset"
HELD_OUT_DATA = "eval_loader.dataset"
TOKENIZER = "tokenizer"
END = "tokenizer (eos_token)"
REFERENCE = " (reference)"
"""End of the key of what has scored a stream of pairs, behind that of the stream."""

ABSENT = "(absent)"
COUNTERS = {"ba": "batch", "ep": "epoch", "tok": "token", "sp": "sample"}

ADAPTERS = ("lora.rank", "lora.alpha", "lora.targets", "lora.use_rslora", "lora.dora", "lora.train_router")
"""Keys that decide what adapters are."""

ORDER = ("train_loader.dataset.shuffle", "train_loader.drop_last", "train_loader.dataset.max_seq_len")
ROWS = tuple(f"train_loader.dataset.{name}" for name in ("packing", "fim", "streams"))
"""Keys, and mappings, on which a position within an epoch depends, beside the size of the global batch."""


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run begins with.

    Attributes:
        checkpoint: Directory of the checkpoint.
        own: True if the run saved it, in ``run_dir`` or ``save_remote``; False if it is ``load_path``'s.
        weights_only: True if its weights are taken, and all else begins anew.
        schedule_changes: Differences from the schedule of the checkpoint's recipe, for a message; empty without any.
        base: Checkpoint of the weights that do not train; None where all train.
    """

    checkpoint: Path
    own: bool = True
    weights_only: bool = False
    schedule_changes: str = ""
    base: Base | None = None


def data_digests(recipe: Recipe) -> dict[str, str]:
    """Map each key of a recipe that names data to the digest of their content: streams of samples, and a tokenizer.

    With ``dpo`` a stream has a second digest, that of the model whose log-probabilities lie beside it. The indices of
    remote data must have been downloaded, as building a loader does.

    Raises:
        UserError: The index of a stream is absent or damaged.
    """
    return _digests(recipe, {key: Path(source.local, str(source.split)) for key, source in _streams(recipe)})


def known_digests(recipe: Recipe) -> dict[str, str]:
    """Map as :func:`data_digests`, for data that are on this machine before anything is downloaded.

    Raises:
        UserError: The index of a stream is damaged.
    """
    places = {
        key: Path(path, str(source.split))
        for key, source in _streams(recipe)
        if (path := directory_of(source)) is not None and Path(path, str(source.split), INDEX_FILE).is_file()
    }
    return _digests(recipe, places)


def _digests(recipe: Recipe, places: Mapping[str, Path]) -> dict[str, str]:
    digests = {key: stream_digest(place) for key, place in places.items()}
    scored = {key: reference_beside(place) for key, place in places.items()} if recipe.dpo is not None else {}
    digests |= {f"{key}{REFERENCE}": reference for key, reference in scored.items() if reference is not None}
    return digests | _tokenizer_digest(recipe)


def _streams(recipe: Recipe) -> Iterator[tuple[str, StreamConfig]]:
    """Yield each stream of samples with its key."""
    loaders = {"train_loader": recipe.train_loader, "eval_loader": recipe.eval_loader}
    for name, loader in loaders.items():
        if loader is not None:
            yield from sources_of(loader, name)


def _tokenizer_digest(recipe: Recipe) -> dict[str, str]:
    directory = Path(recipe.tokenizer.name)
    if not (directory / "tokenizer.json").is_file():
        return {}
    contents = {TOKENIZER: (directory / "tokenizer.json").read_bytes()}
    remote = any(source.remote is not None for _, source in _streams(recipe))
    if remote and recipe.model.document_masking:  # a local corpus says by itself which token ends its documents
        contents[END] = str(declared_token(directory, "eos_token")).encode()
    return {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}


def check_start(checkpoint: Path, own: bool, recipe: Recipe, digests: Mapping[str, str]) -> Start:
    """Decide how a run begins with a checkpoint, with a note of everything that does not go on as it was saved.

    ``own`` is true if the run saved the checkpoint itself; ``digests`` are the run's :func:`data_digests`.

    Raises:
        UserError: The checkpoint is unreadable, or of another architecture; or the run would go on with other data, in
            another order, with another optimizer's state, or has nothing left to train.
    """
    document = read_state(checkpoint)
    saved, here = document["recipe"], flatten(recipe)
    has_adapters = BASE in document
    if has_adapters and recipe.lora is None:
        merging = f"merge them into their base first: moefoundry convert merge {checkpoint}"
        raise UserError(f"{checkpoint} has adapters alone; {merging}, or train them on: lora.rank={saved['lora.rank']}")
    begins_anew = recipe.lora is not None and not has_adapters
    weights_only = document.get(WEIGHTS_ONLY) or begins_anew or (recipe.load_weights_only and not own)
    known = _with_indexer(saved, here) if weights_only and recipe.model.attention.trained_indexer else saved
    check_architecture(checkpoint, known, here, ADAPTERS if has_adapters else ())
    if weights_only:
        return Start(checkpoint, own, weights_only=True)
    if not own:
        _check_something_is_left(checkpoint, document["timestamp"] or {}, recipe.max_duration)
    _check_order(checkpoint, saved, here, recipe.allow_batch_size_change)
    _check_stages(checkpoint, saved, here, document["timestamp"] or {})
    if (stored := document.get("data_digests")) is None:
        _check_data_without_digests(checkpoint, document, here)
    else:
        _check_data(checkpoint, own, stored, here, digests)
    _check_optimizer(checkpoint, saved, here)
    moments = saved.get(MOMENTS, Moments.fp32), here[MOMENTS]
    if (moments[0] == Moments.fp32) != (moments[1] == Moments.fp32):
        _note(f"{MOMENTS}: {moments[1]}; those of {checkpoint}, {moments[0]}, are converted")
    seeds = (document["data"] or {}).get("shuffle_seed"), here[SHUFFLE_SEED]
    if seeds[0] is not None and seeds[0] != seeds[1] and here[ORDER[0]]:
        _note(f"{SHUFFLE_SEED}: {seeds[1]}; the data go on in the order of {checkpoint}, that of {seeds[0]}")
    return Start(checkpoint, own, schedule_changes=_schedule_changes(saved, here, document.get("lr")))


def _with_indexer(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a flat recipe without an indexer that of ``here``, which begins to learn on the other weights."""
    if saved.get(INDEXER, ABSENT) is not None:
        return saved
    own = {key: value for key, value in here.items() if key.startswith(f"{INDEXER}.")}
    return {key: value for key, value in saved.items() if key != INDEXER} | own


def check_architecture(
    checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any], further: Sequence[str] = ()
) -> None:
    """Check that a checkpoint's flat recipe ``saved`` has the architecture of ``own``, and the same ``further`` keys.

    Raises:
        UserError: It has another; names the keys.
    """
    differing = _other_architecture(saved, own)
    differing += [
        f"{key}: {show_leaf(saved.get(key))} there, {show_leaf(own.get(key))} here"
        for key in further
        if saved.get(key) != own.get(key)
    ]
    if differing:
        raise UserError(f"{checkpoint} is a checkpoint of another architecture:\n  " + "\n  ".join(differing))


def _other_architecture(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """List the keys of the architecture that differ between two flat recipes, a line each.

    A key that one of them lacks belongs to a mapping that is null there.
    """
    unread = set(without_effect(saved)) & set(without_effect(own))
    lines = []
    for key in dict.fromkeys((*own, *saved)):
        if is_architecture(key) and not key.startswith(tuple(unread)):
            there, here = saved.get(key), own.get(key)
            if there != here:
                lines.append(f"{key}: {show_leaf(there)} there, {show_leaf(here)} here")
    return lines


def _check_something_is_left(checkpoint: Path, timestamp: Mapping[str, Any], max_duration: str) -> None:
    number = "".join(filter(str.isdigit, max_duration))
    counter = COUNTERS[max_duration.removeprefix(number)]
    if timestamp.get(counter, 0) >= int(number):
        raise UserError(
            f"load_path: {checkpoint} is at {counter} {timestamp[counter]} of max_duration={max_duration}: nothing is "
            "left to train; raise max_duration to go on, or begin a new phase with its weights: load_weights_only=true"
        )


def _check_order(checkpoint: Path, saved: Mapping[str, Any], here: Mapping[str, Any], batch_size_is_free: bool) -> None:
    """Check that the position in the data means the same samples."""
    sizes = saved.get("global_train_batch_size"), here["global_train_batch_size"]
    if sizes[0] != sizes[1] and not batch_size_is_free:
        raise UserError(
            f"global_train_batch_size: {sizes[1]}, and {checkpoint} was written with {sizes[0]}; the rest of its epoch "
            "would be other samples, some of them twice; allow_batch_size_change=true accepts that"
        )
    for key in (*ORDER, *(key for key in {**here, **saved} if key.startswith(ROWS) and not is_free_on_resume(key))):
        if saved.get(key, here[key] if key in ORDER else ABSENT) != here.get(key, ABSENT):
            now, there = (show_leaf(recipe[key]) if key in recipe else ABSENT for recipe in (here, saved))
            raise UserError(
                f"{key}: {now}, and {checkpoint} was written with {there}; the rest "
                "of its epoch would be other samples; begin a new phase with its weights instead: "
                "load_weights_only=true"
            )


def _check_optimizer(checkpoint: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that Muon goes on with a state of Muon, and no other optimizer does."""
    there = saved.get(OPTIMIZER, here[OPTIMIZER])
    if there != here[OPTIMIZER] and MUON in (there, here[OPTIMIZER]):
        raise UserError(
            f"{OPTIMIZER}: {here[OPTIMIZER]}, and {checkpoint} has the state of {there}; begin a new phase with its "
            "weights: load_weights_only=true"
        )


def _check_stages(
    checkpoint: Path, saved: Mapping[str, Any], here: Mapping[str, Any], timestamp: Mapping[str, Any]
) -> None:
    """Check that the stages of the batches so far are the ones they were; those to come may be others."""
    recipes, batches = (saved, here), int(timestamp.get("batch", 0))
    staged = [any(key.startswith(f"{CURRICULUM}.") for key in recipe) for recipe in recipes]
    if not any(staged):
        return
    there, now = (past_of(stages_of_flat(recipe), batches) for recipe in recipes)
    if staged[0] == staged[1] and there == now:
        return
    if staged[0] != staged[1]:
        named, what = CURRICULUM, "one" if staged[0] else "none"
    else:
        first = min((stage.first for stage in {*there} ^ {*now}), default=0)
        named, what = f"{CURRICULUM}.{stage_at(stages_of_flat(here), first).name}", "another stage"
    raise UserError(
        f"{named}: {checkpoint} was written with {what} for its {batches} batches; change stages that have not begun, "
        "or begin a new phase with its weights: load_weights_only=true"
    )


def _check_data(
    checkpoint: Path, own: bool, stored: Mapping[str, str], here: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Check data by their content. Where a run goes on elsewhere, its held-out data may be others."""
    for key in digests:
        if stored.get(key, digests[key]) == digests[key]:
            continue
        place = here["tokenizer.name"] if key in (TOKENIZER, END) else _place(here, key.removesuffix(REFERENCE))
        what = f"{key}: {place} is not what {checkpoint} was saved with"
        if key.endswith(REFERENCE):
            what = f"{key}: {place} has log-probabilities of another model than {checkpoint} was saved with"
        if key.startswith(HELD_OUT_DATA) and not own:
            _note(f"{what}; held-out losses are not to be compared")
            continue
        where = " in another run_dir" if own else ""
        raise UserError(
            f"{what} (digest {digests[key][:12]} here, {stored[key][:12]} there); bring that back, or begin a new "
            f"phase with the weights{where}: load_path={checkpoint} load_weights_only=true"
        )


def _check_data_without_digests(checkpoint: Path, document: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check what is known of data in a checkpoint of an earlier release: their place, and the position in them."""
    position = (document["data"] or {}).get("sample_in_epoch", 0)
    directory = Path(here[f"{TRAINING_DATA}.local"], here[f"{TRAINING_DATA}.split"])
    if position and position > (samples := sum(shard["samples"] for shard in read_shards(directory))):
        raise UserError(
            f"{TRAINING_DATA}: {checkpoint} is at sample {position} of its epoch, and {directory} has {samples}; "
            "bring its data back, or begin a new phase with its weights: load_weights_only=true"
        )
    there, place = _place(document["recipe"], TRAINING_DATA), _place(here, TRAINING_DATA)
    if there != place:
        _note(f"{checkpoint} has no digest of its data, {there}; {place} is taken for the same")


def _place(recipe: Mapping[str, Any], key: str) -> str:
    """Give the place of the stream ``key`` of a flat recipe."""
    split = recipe.get(f"{key}.split") or recipe.get(f"{key.partition('.streams.')[0]}.split")
    return f"{recipe.get(f'{key}.remote') or recipe.get(f'{key}.local')}/{split}"


def _schedule_changes(saved: Mapping[str, Any], here: Mapping[str, Any], last_rate: float | None) -> str:
    """List the keys of the schedule that differ."""
    keys = [key for key in {**saved, **here} if key in ("max_duration", "optimizer.lr") or key.startswith("scheduler.")]
    lines = [
        f"{key} is {show_leaf(here.get(key))}, and was {show_leaf(saved.get(key))}"
        for key in keys
        if saved.get(key) != here.get(key)
    ]
    if lines and last_rate is not None:
        lines.append(f"the batch before had {last_rate:.4g}")
    return "; ".join(lines)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
