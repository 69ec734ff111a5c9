"""Loaders and tokenizers of LLM Foundry: training here reads data that ``moefoundry prepare`` wrote once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.data.summary import CORPUS_FILE
from moefoundry.migration.draft import Draft

PREPARED = "`moefoundry prepare` writes it once"
ANEW = "data are prepared anew: documents, not packed shards, are read"
SHARES = {"proportion": float, "repeat": float, "choose": int}
READER = "the reader sets it"
LOADER = {
    "pin_memory": READER,
    "prefetch_factor": READER,
    "persistent_workers": READER,
    "timeout": READER,
    "sampler": READER,
    "predownload": READER,
    "cache_limit": READER,
    "download_retry": READER,
    "download_timeout": READER,
    "batching_method": READER,
    "partition_algo": READER,
    "num_canonical_nodes": READER,
    "shuffle_algo": READER,
    "shuffle_block_size": READER,
    "keep_zip": READER,
    "eos_token_id": "documents end with the tokenizer's own end of text",
    "bos_token_id": "documents end with the tokenizer's own end of text",
    "label": "one split is evaluated",
    "packing_ratio": f"{PREPARED}, packed",
    "allow_pad_trimming": f"{PREPARED}, packed",
    "decoder_only_format": "all models here are decoders",
    "padding_side": f"{PREPARED}, packed",
    "hf_name": PREPARED,
    "hf_kwargs": PREPARED,
    "safe_load": "no code of a data set runs",
    "preprocessing_fn": "no code of a data set runs: turn it into JSON lines first",
    "target_prompts": PREPARED,
    "target_responses": PREPARED,
    "include_end": PREPARED,
}


def move_tokenizer(draft: Draft, section: str = "tokenizer") -> None:
    """Account for the tokenizer, which stands beside prepared data."""
    name = draft.value(f"{section}.name", draft.value(section))
    if name is not None:
        where = str(name) if Path(str(name)).is_dir() else "TOKENIZER_DIR"
        why = f"prepared data hold their tokenizer: prepare ... --tokenizer {where}"
        draft.drop(f"{section}.name" if f"{section}.name" in draft.old else section, why)
    for path in draft.below(section):
        draft.drop(path, "prepared data hold their tokenizer, and max_seq_len says the length")


def move_loader(draft: Draft, section: str, name: str) -> None:
    """Move a loader.

    Args:
        draft: The recipe.
        section: ``train_loader`` or ``eval_loader``.
        name: Name of the run, for the directory of data that are yet to be prepared.
    """
    kind = draft.value(f"{section}.name", "text")
    draft.put(
        f"{section}.name", "text", f"{section}.name", "" if kind == "text" else "one loader reads all prepared data"
    )
    dataset = f"{section}.dataset"
    if len(names := _streams(draft, dataset)) > 1:
        _move_streams(draft, dataset, names, name)
    else:
        _flatten_the_only_stream(draft, dataset)
        _move_place(draft, section, name)
    _move_split(draft, section)
    for key, top in (("max_seq_len", "max_seq_len"), ("shuffle_seed", "seed")):
        path = f"{dataset}.{key}"
        if path in draft.old and draft.old[path] in (draft.value(top), None):
            draft.same(path, path, f"as {top}")
    for path in draft.below(section):
        group = path.removeprefix(f"{dataset}.").partition(".")[0]
        if group in ("hf_kwargs", "streams"):
            draft.drop(path, PREPARED)
        elif draft.old[path] is None:
            draft.silence(path)
        else:
            draft.move(path, LOADER)


def _flatten_the_only_stream(draft: Draft, dataset: str) -> None:
    """Let ``streams`` with one entry stand as the data set itself."""
    for path, value in draft.section(f"{dataset}.streams").items():
        key = path.partition(".")[2]
        if key in ("local", "remote", "split"):
            draft.old[f"{dataset}.{key}"] = value
            draft.silence(f"{dataset}.streams.{path}")


def _streams(draft: Draft, dataset: str) -> list[str]:
    return list(dict.fromkeys(path.partition(".")[0] for path in draft.section(f"{dataset}.streams")))


def _move_streams(draft: Draft, dataset: str, names: list[str], run: str) -> None:
    """Move several streams, each of which is prepared by itself."""
    for name in names:
        stream = f"{dataset}.streams.{name}"
        local = f"{stream}.local"
        draft.put(local, f"data/{run}-{name}", local if local in draft.old else "", ANEW)
        draft.notes.append(f"data: moefoundry prepare DOCUMENTS data/{run}-{name} --tokenizer DIR")
        for key, kind in SHARES.items():
            value = draft.value(path := f"{stream}.{key}")
            if isinstance(value, (int, float)):
                draft.put(path, kind(value), path)
        for path in draft.below(stream):
            draft.silence(path) if draft.old[path] is None else draft.drop(path, READER)


def _move_place(draft: Draft, section: str, name: str) -> None:
    local, remote = f"{section}.dataset.local", f"{section}.dataset.remote"
    said: Any = draft.value(local)
    if said is not None and Path(str(said), CORPUS_FILE).is_file():
        draft.put(local, said, local)
        if draft.value(remote) is not None:
            draft.put(remote, draft.old[remote], remote)
    else:
        draft.put(local, f"data/{name}", local if local in draft.old else "", ANEW)
        if draft.value(remote) is not None:
            draft.drop(remote, "it holds LLM Foundry's shards; upload the prepared data, and name them here")
        if (note := f"data: moefoundry prepare DOCUMENTS data/{name} --tokenizer DIR") not in draft.notes:
            draft.notes.append(note)
    draft.silence(remote)


def _move_split(draft: Draft, section: str) -> None:
    path = f"{section}.dataset.split"
    split, own = draft.value(path), "train" if section == "train_loader" else "val"
    if split is not None and split != own:
        draft.put(path, own, path, "the splits of prepared data are train and val")
    elif path in draft.old:
        draft.put(path, own, path)
    elif section == "eval_loader":
        draft.put(path, own, why="the held-out split")


def move_eval_loader(draft: Draft, old: dict[str, Any], name: str) -> None:
    """Move ``eval_loader``, of several the first; without one, nothing is evaluated."""
    loaders = old.get("eval_loader")
    if isinstance(loaders, list):
        draft.silence("eval_loader")
        draft.old.pop("eval_loader", None)
        draft.notes.append(f"eval_loader: of {len(loaders)} loaders the first was moved; one split is evaluated")
        first = loaders[0] if loaders and isinstance(loaders[0], dict) else {}
        draft.old |= {f"eval_loader.{key}": value for key, value in _leaves(first).items()}
        loaders = first or None
    if not loaders:
        draft.put("eval_loader", None, "eval_loader" if "eval_loader" in draft.old else "", "nothing is evaluated")
        return
    move_loader(draft, "eval_loader", name)


def _leaves(mapping: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= _leaves(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return found
