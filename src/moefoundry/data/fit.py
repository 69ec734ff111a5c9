"""Check that prepared data fit a recipe, by their small files.

``validate`` does so in well under a second, and training before it imports or allocates anything. The content of a
shard is checked when it is first read (``guard.py``). Data behind a URL are not checked: ``local`` is their cache.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from moefoundry.config.curriculum import KEY, rows_of_a_batch, stages_of
from moefoundry.config.errors import ConfigError, Problem, UserError
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_data import PackingMethod, StreamConfig
from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.config.urls import is_url, resolved
from moefoundry.data.identity import INDEX_FILE, read_shards
from moefoundry.data.summary import CORPUS_FILE, LENGTHS_FILE, CorpusSummary, Layout, SplitSummary, read_corpus_summary


def check_data(recipe: Recipe, world_size: int = 1) -> None:
    """Check that the data fit a recipe.

    Args:
        recipe: The recipe to train.
        world_size: Number of ranks; an evaluation batch is multiplied by it.

    Raises:
        ConfigError: Names every key that they do not fit, or that names data which are not there.
    """
    batches = {
        "train_loader": rows_of_a_batch(stages_of(recipe), recipe.max_seq_len),
        "eval_loader": recipe.device_eval_batch_size * world_size,
    }
    found: list[Problem] = []
    for key, loader in _loaders(recipe).items():
        found += loader_problems(loader, key, recipe.model.vocab_size, batches[key], remote=True)
        found += fim_problems(loader, key, Path(recipe.tokenizer.name))
    if not found:
        found += [*tokenizer_problems(recipe), *stage_problems(recipe), *preference_problems(recipe)]
        found += [] if found else reference_problems(recipe)
    found += report_problems(recipe)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))  # both loaders may have the same problem


def all_absent(recipe: Recipe) -> list[Problem]:
    """List the data of a recipe, where none of them are on this machine; empty where any are."""
    read = {
        path: (where, source, loader.dataset)
        for key, loader in reversed(_loaders(recipe).items())
        for where, source in sources_of(loader, key)
        if (path := directory_of(source))
    }
    tokenizer = Path(recipe.tokenizer.name)
    if tokenizer.exists() or any(Path(path).exists() for path in read):
        return []
    absent = []
    for path, (where, source, dataset) in read.items():
        if source.remote is None:
            absent.append(Problem(f"{where}.local", _how_to_make(source, dataset, recipe.model.vocab_size)))
        else:
            absent.append(Problem(f"{where}.remote", f"{path}: no such directory"))
    if recipe.callbacks.report is not None and not any(tokenizer.is_relative_to(path) for path in read):
        absent.append(Problem("tokenizer.name", f"{tokenizer}: no such directory"))
    return absent


def _loaders(recipe: Recipe) -> dict[str, LoaderConfig]:
    loaders = {"train_loader": recipe.train_loader, "eval_loader": recipe.eval_loader}
    return {key: loader for key, loader in loaders.items() if loader is not None}


def directory_of(source: StreamConfig) -> str | None:
    """Return the directory of the data themselves; None if a URL names them."""
    if source.remote is None:
        return source.local
    remote = resolved(source.remote)
    return None if is_url(remote) else remote


def sources_of(cfg: LoaderConfig, key: str) -> Iterator[tuple[str, StreamConfig]]:
    """Yield each source of a loader with its key; ``key`` is the loader's."""
    for name, source in cfg.dataset.sources.items():
        yield f"{key}.dataset.streams.{name}" if name else f"{key}.dataset", source


def loader_problems(
    cfg: LoaderConfig, key: str, model_vocab_size: int, global_batch: int, remote: bool = False
) -> Iterator[Problem]:
    """Find what is wrong with a loader of local data.

    Args:
        cfg: The loader.
        key: Its key in the recipe.
        model_vocab_size: Rows of the embedding.
        global_batch: Samples of a batch of all ranks.
        remote: Look at remote data, too, as far as they are in a directory.
    """
    summaries: dict[str, CorpusSummary] = {}
    for where, source in sources_of(cfg, key):
        path = directory_of(source)
        if path is None or (source.remote is not None and not remote):
            continue
        found = list(_source_problems(cfg, where, source, path, model_vocab_size))
        yield from found
        if not found and Path(path, CORPUS_FILE).is_file():
            summaries[where] = read_corpus_summary(path)
    if len(summaries) < len(cfg.dataset.sources):
        return
    (first, reference), *others = summaries.items()
    for where, summary in others:
        if summary.tokenizer_sha256 != reference.tokenizer_sha256:
            yield Problem(f"{where}.local", f"has another tokenizer than {first}; one model reads one")
    place = ", ".join(f"{directory_of(source)}/{source.split}" for _, source in sources_of(cfg, key))
    splits = [
        (summary, summary.splits[str(source.split)])
        for summary, source in zip(summaries.values(), cfg.dataset.sources.values(), strict=True)
    ]
    rows = sum(
        fewest_rows(split, cfg.dataset) if summary.layout is Layout.documents else split.samples
        for summary, split in splits
    )
    unweighted = all(source.proportion is source.repeat is source.choose for source in cfg.dataset.sources.values())
    if cfg.drop_last and unweighted and (message := too_few_samples(place, rows, global_batch)):
        yield Problem("global_train_batch_size" if key == "train_loader" else "device_eval_batch_size", message)


def fewest_rows(split: SplitSummary, dataset: DatasetConfig) -> int:
    """Count the rows that the documents of a split fill at least."""
    if dataset.packing.method == PackingMethod.pairs:
        return split.documents // 2
    filled = -(-split.tokens // dataset.max_seq_len)
    return max(filled, split.documents) if dataset.packing.method == PackingMethod.none else filled


def _source_problems(
    cfg: LoaderConfig, where: str, source: StreamConfig, path: str, model_vocab_size: int
) -> Iterator[Problem]:
    """Find what is wrong with one source, at the key ``where``, whose data are in ``path``.

    Where remote data lack the small files, since only shards were copied, it is found as samples are read.
    """
    index = Path(path, str(source.split), INDEX_FILE)
    if source.remote is None:
        yield from _corpus_problems(cfg, f"{where}.local", where, source, Path(path), model_vocab_size)
        if index.parent.is_dir():
            yield from _shard_problems(index, where, cfg.dataset.validate_hash)
    elif not index.is_file():
        yield Problem(f"{where}.remote", f"{index}: no such file")
    elif Path(path, CORPUS_FILE).is_file():
        yield from _corpus_problems(cfg, f"{where}.remote", where, source, Path(path), model_vocab_size)


def _corpus_problems(
    cfg: LoaderConfig, key: str, where: str, source: StreamConfig, local: Path, model_vocab_size: int
) -> Iterator[Problem]:
    """Find what ``corpus.json`` tells: of the data in ``local``, which ``key`` names, a key of ``where``."""
    dataset, name = cfg.dataset, str(source.split)
    if not local.exists():
        yield Problem(key, _how_to_make(source, dataset, model_vocab_size))
        return
    try:
        summary = read_corpus_summary(local)
    except UserError as error:
        yield Problem(key, str(error))
        return
    loader = where.partition(".")[0]
    if summary.layout is Layout.packed:
        if summary.max_seq_len != dataset.max_seq_len:
            message = f"{local}: packed to max_seq_len {summary.max_seq_len}, and the recipe's max_seq_len is "
            message += f"{dataset.max_seq_len}; change the recipe, or prepare the data again"
            yield Problem(f"{loader}.dataset.max_seq_len", message)
        if message := packed_already(str(local), dataset):
            yield Problem(f"{loader}.dataset.{'packing.method' if dataset.fim is None else 'fim'}", message)
    if summary.vocab_size > model_vocab_size:
        message = f"{local}: its vocabulary of {summary.vocab_size} exceeds the model's vocab_size {model_vocab_size}"
        yield Problem("model.vocab_size", message)
    if name not in summary.splits:
        nothing_held_out = "" if "val" in summary.splits else " (val_fraction=0; eval_loader=null evaluates nothing)"
        message = f"{local}: no split {name!r}; it has {', '.join(summary.splits)}{nothing_held_out}"
        yield Problem(f"{where}.split", message)
    elif not summary.splits[name].samples:
        yield Problem(f"{where}.split", f"{local / name}: no samples")
    elif message := _other_lengths(local / name, summary.splits[name].lengths_sha256):
        yield Problem(key, message)


def _other_lengths(directory: Path, sha256: str | None) -> str:
    """Describe lengths of documents that are not what ``corpus.json`` says; empty if they are, or there are none."""
    file = directory / LENGTHS_FILE
    if sha256 is None:
        return ""
    if not file.is_file():
        return f"{file}: no such file; prepare the data again"
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return "" if found == sha256 else f"{file}: damaged: not what {CORPUS_FILE} says; prepare the data again"


def packed_already(place: str, dataset: DatasetConfig) -> str:
    """Describe what a dataset asks for that data packed at preparation cannot give; empty if that is nothing."""
    method = f"packing.method={dataset.packing.method} packs documents"
    asked = "fill-in-the-middle reorders documents" if dataset.fim is not None else method
    if dataset.fim is None and dataset.packing.method == PackingMethod.concat:
        return ""
    return f"{place}: {asked}, and these data were packed when they were prepared; prepare documents, the default"


def fim_problems(cfg: LoaderConfig, key: str, tokenizer: Path) -> Iterator[Problem]:
    """Find a tokenizer without the special tokens that a loader's fill-in-the-middle needs."""
    if cfg.dataset.fim is None:
        return

    from moefoundry.data.fim import Sentinels
    from moefoundry.data.tokenizer import open_backend

    try:
        Sentinels.of(open_backend(tokenizer), tokenizer, cfg.dataset.fim.sentinels)
    except UserError as error:
        yield Problem(f"{key}.dataset.fim", str(error))


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


def stage_problems(recipe: Recipe) -> Iterator[Problem]:
    """Find stages whose rows have another length than the samples of data that were packed when they were prepared."""
    for where, source in sources_of(recipe.train_loader, "train_loader") if recipe.curriculum else ():
        path = directory_of(source)
        length = read_corpus_summary(path).max_seq_len if path and Path(path, CORPUS_FILE).is_file() else None
        for stage in stages_of(recipe) if length is not None else ():
            if stage.seq_len != length:
                message = f"{stage.seq_len}, and {where} was packed to {length} when it was prepared"
                yield Problem(
                    f"{KEY}.{stage.name}.max_seq_len", message, "any, of data prepared with --layout documents"
                )


def tokenizer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Find held-out data that another tokenizer has made than the training data, as far as both are in directories."""
    known = {
        (key, where): read_corpus_summary(path).tokenizer_sha256
        for key, loader in _loaders(recipe).items()
        for where, source in sources_of(loader, key)
        if (path := directory_of(source)) and Path(path, CORPUS_FILE).is_file()
    }
    trained = [digest for (key, _), digest in known.items() if key == "train_loader"]
    for (key, where), digest in known.items():
        if key == "eval_loader" and trained and digest != trained[0]:
            yield Problem(f"{where}.local", "has another tokenizer than train_loader.dataset; one model reads one")


def preference_problems(recipe: Recipe) -> Iterator[Problem]:
    """Find preferences that a recipe would train on, or evaluate, as texts, the rejected responses like the chosen."""
    for key, loader in _loaders(recipe).items() if recipe.dpo is None else ():
        for where, source in sources_of(loader, key):
            path = directory_of(source)
            if path and Path(path, CORPUS_FILE).is_file() and read_corpus_summary(path).kind == "preferences":
                message = f"{path}: preferences, whose rejected responses would be learnt, too; dpo tells them apart"
                yield Problem(f"{where}.local", message, "data of another kind, or dpo: docs/finetuning.md")


def reference_problems(recipe: Recipe) -> Iterator[Problem]:
    """Find pairs that are there without the log-probabilities of a reference, which ``dpo`` needs."""
    if recipe.dpo is None:
        return

    from moefoundry.data.reference import read_reference
    from moefoundry.data.sources import read_lengths

    for key, loader in _loaders(recipe).items():
        for where, source in sources_of(loader, key):
            place = Path(source.local, str(source.split))
            if (place / INDEX_FILE).is_file():
                try:
                    read_reference(place, len(read_lengths(place)) // 2)
                except UserError as error:
                    yield Problem(f"{where}.local", str(error))


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


def _how_to_make(source: StreamConfig, dataset: DatasetConfig, model_vocab_size: int) -> str:
    command = ["moefoundry", "prepare", "stdlib", source.local]
    own = "(or your own text in place of stdlib)"
    if dataset.packing.method == PackingMethod.pairs:
        command = ["moefoundry", "prepare", "PAIRS.jsonl", source.local, "--preferences", "--tokenizer", "DIR"]
        own = "(your own pairs, and the model's tokenizer)"
    else:
        command += ["--vocab-size", str(model_vocab_size)]
        if dataset.packing.method != PackingMethod.concat or dataset.fim is not None:
            own = "(or your own text; for a trained model RECORDS.jsonl --instructions --tokenizer DIR)"
    missing = f"{Path(source.local)}: no such directory (the recipe's dataset.local)"
    return f"{missing}; make it with: {shlex.join(command)} {own}"


def _shard_problems(file: Path, where: str, algorithm: str | None) -> Iterator[Problem]:
    """Find shards of the index ``file`` that are missing or truncated, which would end the run when it reads them."""
    directory = file.parent
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
        elif message := missing_hash(file, info["basename"], info["hashes"], algorithm):
            yield Problem(f"{where.partition('.')[0]}.dataset.validate_hash", message)
            return  # the other shards lack it, too
