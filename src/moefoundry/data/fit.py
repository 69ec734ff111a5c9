"""Check that prepared data fit a recipe, by their small files.

``validate`` does so in well under a second, and training before it imports or allocates anything. The content of a
shard is checked when it is first read (``guard.py``). Data behind a URL are not checked: ``local`` is their cache.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from moefoundry.config.errors import ConfigError, Problem, UserError
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.config.urls import is_url, resolved
from moefoundry.data.identity import INDEX_FILE, read_shards
from moefoundry.data.summary import CORPUS_FILE, read_corpus_summary


def check_data(recipe: Recipe, world_size: int = 1) -> None:
    """Check that the data fit a recipe.

    Args:
        recipe: The recipe to train.
        world_size: Number of ranks; an evaluation batch is multiplied by it.

    Raises:
        ConfigError: Names every key that they do not fit, or that names data which are not there.
    """
    batches = {
        "train_loader": recipe.global_train_batch_size,
        "eval_loader": recipe.device_eval_batch_size * world_size,
    }
    found: list[Problem] = []
    for key, loader in _loaders(recipe).items():
        if loader.dataset.remote is None:
            found += loader_problems(loader, key, recipe.model.vocab_size, batches[key])
        elif path := directory_of(loader.dataset):
            found += _remote_problems(loader, key, path, recipe.model.vocab_size, batches[key])
    found += report_problems(recipe)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))  # both loaders may have the same problem


def all_absent(recipe: Recipe) -> list[Problem]:
    """List the data of a recipe, where none of them are on this machine; empty where any are."""
    read = {path: key for key, loader in reversed(_loaders(recipe).items()) if (path := directory_of(loader.dataset))}
    tokenizer = Path(recipe.tokenizer.name)
    if tokenizer.exists() or any(Path(path).exists() for path in read):
        return []
    absent = []
    for path, key in read.items():
        dataset = _loaders(recipe)[key].dataset
        if dataset.remote is None:
            absent.append(Problem(f"{key}.dataset.local", _how_to_make(dataset, recipe.model.vocab_size)))
        else:
            absent.append(Problem(f"{key}.dataset.remote", f"{path}: no such directory"))
    if recipe.callbacks.report is not None and not any(tokenizer.is_relative_to(path) for path in read):
        absent.append(Problem("tokenizer.name", f"{tokenizer}: no such directory"))
    return absent


def _loaders(recipe: Recipe) -> dict[str, LoaderConfig]:
    loaders = {"train_loader": recipe.train_loader, "eval_loader": recipe.eval_loader}
    return {key: loader for key, loader in loaders.items() if loader is not None}


def directory_of(dataset: DatasetConfig) -> str | None:
    """Return the directory of the data themselves; None if a URL names them."""
    if dataset.remote is None:
        return dataset.local
    remote = resolved(dataset.remote)
    return None if is_url(remote) else remote


def loader_problems(cfg: LoaderConfig, key: str, model_vocab_size: int, global_batch: int) -> Iterator[Problem]:
    """Find what is wrong with a loader of local data.

    Args:
        cfg: The loader.
        key: Its key in the recipe.
        model_vocab_size: Rows of the embedding.
        global_batch: Samples of a batch of all ranks.
    """
    yield from _corpus_problems(cfg, key, model_vocab_size, global_batch)
    if Path(cfg.dataset.local, cfg.dataset.split).is_dir():
        yield from _shard_problems(cfg.dataset, f"{key}.dataset")


def _corpus_problems(cfg: LoaderConfig, key: str, model_vocab_size: int, global_batch: int) -> Iterator[Problem]:
    """Find what ``corpus.json`` tells; arguments as of :func:`loader_problems`."""
    dataset, local = cfg.dataset, Path(cfg.dataset.local)
    where, place = f"{key}.dataset", local / dataset.split
    if not local.exists():
        yield Problem(f"{where}.local", _how_to_make(dataset, model_vocab_size))
        return
    try:
        summary = read_corpus_summary(local)
    except UserError as error:
        yield Problem(f"{where}.local", str(error))
        return
    if summary.max_seq_len != dataset.max_seq_len:
        message = f"{local}: packed to max_seq_len {summary.max_seq_len}, and the recipe's max_seq_len is "
        message += f"{dataset.max_seq_len}; change the recipe, or prepare the data again"
        yield Problem(f"{where}.max_seq_len", message)
    if summary.vocab_size > model_vocab_size:
        message = f"{local}: its vocabulary of {summary.vocab_size} exceeds the model's vocab_size {model_vocab_size}"
        yield Problem("model.vocab_size", message)
    if dataset.split not in summary.splits:
        nothing_held_out = "" if "val" in summary.splits else " (val_fraction=0; eval_loader=null evaluates nothing)"
        message = f"{local}: no split {dataset.split!r}; it has {', '.join(summary.splits)}{nothing_held_out}"
        yield Problem(f"{where}.split", message)
    elif not (samples := summary.splits[dataset.split].samples):
        yield Problem(f"{where}.split", f"{place}: no samples")
    elif cfg.drop_last and (message := too_few_samples(str(place), samples, global_batch)):
        batch = "global_train_batch_size" if key == "train_loader" else "device_eval_batch_size"
        yield Problem(batch, message)


def _remote_problems(cfg: LoaderConfig, key: str, path: str, vocab_size: int, global_batch: int) -> Iterator[Problem]:
    """Find what is wrong with a loader of remote data in a directory.

    Where that lacks the small files, since only shards were copied, it is found as samples are read.
    """
    index = Path(path, cfg.dataset.split, INDEX_FILE)
    if not index.is_file():
        yield Problem(f"{key}.dataset.remote", f"{index}: no such file")
    elif Path(path, CORPUS_FILE).is_file():
        there = replace(cfg, dataset=replace(cfg.dataset, local=path, remote=None))
        for problem in _corpus_problems(there, key, vocab_size, global_batch):
            at_remote = problem.path == f"{key}.dataset.local"
            yield replace(problem, path=f"{key}.dataset.remote") if at_remote else problem


def another_length(place: str, encodings: Collection[str], max_seq_len: int) -> str:
    """Describe samples whose length is not the recipe's; empty if it is, or is not known.

    Args:
        place: Place of the samples, for the message.
        encodings: Encodings of their tokens, such as ``ndarray:uint16:64``.
        max_seq_len: The recipe's.
    """
    for encoding in encodings:
        length = encoding.rpartition(":")[2]
        if encoding.count(":") == 2 and length.isdecimal() and int(length) != max_seq_len:
            return f"{place}: samples of {length} tokens, and the recipe's max_seq_len is {max_seq_len}"
    return ""


def too_few_samples(place: str, samples: int, global_batch: int) -> str:
    """Describe a split that has no whole global batch; empty if it has one."""
    if samples >= global_batch:
        return ""
    more = "prepare more text or lower the batch size"
    return f"{place}: {samples} sample(s), fewer than one global batch of {global_batch}; {more}"


def missing_hash(index: Path, shard: str, hashes: Collection[str], algorithm: str | None) -> str:
    """Describe a shard that ``validate_hash`` cannot check; empty if it can.

    Args:
        index: File that lists the shard.
        shard: Name of its file.
        hashes: Algorithms of which the index has its hash.
        algorithm: Algorithm to check; None checks sizes alone.
    """
    if algorithm is None or algorithm in hashes:
        return ""
    there = ", ".join(sorted(hashes)) or "none"
    hint = "the recipe's dataset.validate_hash; null checks sizes alone"
    return f"{index}: no {algorithm} of {shard}; it has {there} ({hint})"


def report_problems(recipe: Recipe) -> Iterator[Problem]:
    """Find what is wrong with the report at the end of a run: its tokenizer, or a prompt without tokens."""
    report = recipe.callbacks.report
    if report is None:
        return

    from moefoundry.data.tokenizer import check_vocabulary

    try:
        tokenizer = check_vocabulary(Path(recipe.tokenizer.name), recipe.model.vocab_size)
    except UserError as error:
        yield Problem("tokenizer.name", str(error).removeprefix("tokenizer.name: "))
        return
    if report.prompt is None:
        return
    try:
        tokens, reason = tokenizer.encode(report.prompt, add_special_tokens=False).ids, ""
    except Exception as error:  # the library raises bare Exception
        tokens, reason = [], f" ({error})"
    if not tokens:
        message = f"{recipe.tokenizer.name} makes no token of it{reason}"
        yield Problem("callbacks.report.prompt", message, allowed="text of at least one token")


def _how_to_make(dataset: DatasetConfig, model_vocab_size: int) -> str:
    command = ["moefoundry", "prepare", "stdlib", dataset.local]
    command += ["--max-seq-len", str(dataset.max_seq_len), "--vocab-size", str(model_vocab_size)]
    return (
        f"{Path(dataset.local)}: no such directory (the recipe's dataset.local); make it with: {shlex.join(command)} "
        "(or your own text in place of stdlib)"
    )


def _shard_problems(dataset: DatasetConfig, where: str) -> Iterator[Problem]:
    """Find shards of the index that are missing or truncated, which would end the run when it reads them."""
    directory = Path(dataset.local, dataset.split)
    file = directory / INDEX_FILE
    try:
        shards = read_shards(directory)
    except UserError as error:
        yield Problem(f"{where}.local", str(error))
        return
    for shard in shards:
        info = shard["raw_data"]
        path = directory / info["basename"]
        if not path.is_file():
            yield Problem(f"{where}.local", f"{path}: missing shard")
        elif path.stat().st_size != info["bytes"]:
            size = f"{path.stat().st_size} bytes of {info['bytes']}"
            yield Problem(f"{where}.local", f"{path}: truncated shard: {size}")
        elif message := missing_hash(file, info["basename"], info["hashes"], dataset.validate_hash):
            yield Problem(f"{where}.validate_hash", message)
            return  # the other shards lack it, too
