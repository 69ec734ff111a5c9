"""Loaders and tokenizers of LLM Foundry: training here reads data that ``moefoundry prepare`` wrote once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.data.summary import CORPUS_FILE
from moefoundry.migration.draft import Draft

PREPARED = "`moefoundry prepare` writes it once"
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
    """Let ``streams`` with one entry stand as the data set itself; of several, the first."""
    streams = draft.section(f"{dataset}.streams")
    names = list(dict.fromkeys(path.partition(".")[0] for path in streams))
    if not names:
        return
    for path, value in streams.items():
        stream, _, key = path.partition(".")
        if stream == names[0] and key in ("local", "remote", "split"):
            draft.old[f"{dataset}.{key}"] = value
            draft.silence(f"{dataset}.streams.{path}")
    if len(names) > 1:
        draft.notes.append(f"{dataset}.streams: only the first of {len(names)} was moved; prepare them together")


def _move_place(draft: Draft, section: str, name: str) -> None:
    local, remote = f"{section}.dataset.local", f"{section}.dataset.remote"
    said: Any = draft.value(local)
    if said is not None and Path(str(said), CORPUS_FILE).is_file():
        draft.put(local, said, local)
        if draft.value(remote) is not None:
            draft.put(remote, draft.old[remote], remote)
    else:
        why = "data are prepared anew: documents, not packed shards, are read"
        draft.put(local, f"data/{name}", local if local in draft.old else "", why)
        if draft.value(remote) is not None:
            draft.drop(remote, "it holds LLM Foundry's shards; upload the prepared data, and name them here")
        note = (
            f"moefoundry prepare DOCUMENTS data/{name} --max-seq-len {draft.value('max_seq_len', 'N')} --tokenizer DIR"
        )
        if (text := f"data: {note}") not in draft.notes:
            draft.notes.append(text)
    draft.silence(remote)


def _move_split(draft: Draft, section: str) -> None:
    path = f"{section}.dataset.split"
    split, own = draft.value(path), "train" if section == "train_loader" else "val"
    if split is not None and split != own and f"{section}.dataset.local" in draft.new:
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
