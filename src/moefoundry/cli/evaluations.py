"""The kinds of evaluation of ``moefoundry eval``. Each gives what was found as plain values, ``metrics`` among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from composer.devices import DeviceCPU
from composer.utils import dist
from tqdm import tqdm

from moefoundry.checkpoint.manifest import read_state
from moefoundry.checkpoint.ranks import rank, saying
from moefoundry.checkpoint.store import TOKENIZER
from moefoundry.checkpoint.weights import read_section
from moefoundry.cli.arguments import check_writable, device_named
from moefoundry.cli.eval import Request
from moefoundry.config import DatasetConfig, LoaderConfig, MeshConfig, UserError
from moefoundry.config.build import Builder
from moefoundry.config.errors import ConfigError
from moefoundry.config.schema_data import PackingConfig, PackingMethod
from moefoundry.config.spec import filled
from moefoundry.config.tasks import read_gauntlet, read_tasks
from moefoundry.data.loader import build_loader
from moefoundry.data.options import Kind
from moefoundry.data.summary import CorpusSummary, Layout, read_corpus_summary
from moefoundry.data.tokenizer import load_tokenizer
from moefoundry.evaluation.batched import BatchedModel
from moefoundry.evaluation.code_completion import complete_problems
from moefoundry.evaluation.code_tasks import (
    check_allowed,
    check_tests,
    pass_at_k,
    read_problems,
    run_samples,
    write_results,
)
from moefoundry.evaluation.generation import Sampling
from moefoundry.evaluation.held_out import held_out_loss
from moefoundry.evaluation.sandbox.run import Limits
from moefoundry.evaluation.tasks.code import say_what_is_broken, say_what_is_open
from moefoundry.evaluation.tasks.run import (
    Sizes,
    check_tasks,
    evaluate_tasks,
    load_tasks,
    say_what_is_left_out,
    write_samples,
)
from moefoundry.mesh import Meshes, resolve_degrees
from moefoundry.pretrained import EvaluatedModel
from moefoundry.world import device_of_rank, join_meshes, torch_device

TIMEOUT = 600.0  # of collectives, seconds
MAX_SEQ_LEN = 2048  # of a model of which no run says it
HELD_OUT = "val"  # split that --data evaluates

Found = dict[str, Any]
Samples = Callable[[Path], None]
"""Writes the samples of an evaluation to a file."""


def check(request: Request) -> None:
    """Check what needs no model.

    Raises:
        UserError: An option is out of range, a file with tasks or averages is wrong, or a directory is missing.
        OSError: The file for samples cannot be written.
    """
    for name in ("batch_size", "max_seq_len", "limit"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if request.output is not None and not request.output.parent.is_dir():
        raise UserError(f"{request.output.parent}: no such directory")
    if request.output is not None:
        check_writable(request.output)
    if request.tasks is not None:
        read_tasks(str(request.tasks))
    if request.gauntlet is not None:
        if request.tasks is None:
            raise UserError(f"gauntlet={request.gauntlet}: averages of TASKS, a file with icl_tasks; give that, too")
        read_gauntlet(str(request.gauntlet))
    if request.humaneval is not None:
        check_allowed(request.code["allow_code_execution"])
        Limits(seconds=request.code["timeout"])
        _draws(request.code)


def shared_world(mesh: str | None, device: str | None) -> tuple[Meshes | None, torch.device]:
    """Join the ranks, and build the meshes that an option asks for; one rank needs none.

    Raises:
        ConfigError: The option is no mesh, or does not fit the number of ranks.
    """
    try:
        tree = yaml.safe_load(mesh or "{}")
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"mesh={mesh}: no mapping such as '{{expert: 2}}'")
    builder = Builder()
    cfg = builder.build(MeshConfig, filled(MeshConfig(), tree), "mesh")
    if builder.problems:
        raise ConfigError(builder.problems, "--mesh")
    degrees = resolve_degrees(cfg, dist.get_world_size(), dist.get_local_world_size())
    if dist.get_world_size() == 1:
        return None, device_named(device)
    if device is not None:
        device_named(device)
    used = DeviceCPU() if device == "cpu" else device_of_rank()
    return join_meshes(degrees, used, TIMEOUT), torch_device(used)


def evaluate(evaluated: EvaluatedModel, request: Request) -> tuple[Found, Samples | None]:
    """Evaluate what is asked for; every rank calls it. What it found on rank 0 is to be printed, then saved."""
    found, samples = _evaluate(evaluated, request)
    return {"checkpoint": evaluated.name} | found, samples


def _evaluate(evaluated: EvaluatedModel, request: Request) -> tuple[Found, Samples | None]:
    if request.humaneval is not None:
        return _humaneval(evaluated, request, request.humaneval)
    if request.harness is not None:
        return _harness(evaluated, request, request.harness)
    if request.data is not None:
        loader, alone = _loader(evaluated, request, request.data)
        _check_tokenizer(evaluated, request.data)
        return _held_out(evaluated, request, loader, alone=alone), None
    if request.tasks is not None:
        gauntlet = request.gauntlet
        return _tasks(evaluated, request, str(request.tasks), None if gauntlet is None else str(gauntlet))
    return _of_recipe(evaluated, request)


def save(samples: Samples, file: Path) -> None:
    """Write the samples of an evaluation.

    Raises:
        UserError: They cannot be written.
    """
    try:
        samples(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def print_found(found: Found) -> None:
    """Print what was found, a line for each metric."""
    if "output" in found:
        print(f"{found['problems']} problems, {found['samples']} samples: {found['output']}")
    metrics = found.get("metrics", {name: value for name, value in found.items() if name.startswith("pass@")})
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if "output" in found else f"{name:{width}}  {value:.4f}")


def _tasks(evaluated: EvaluatedModel, request: Request, tasks: Any, gauntlet: Any) -> tuple[Found, Samples]:
    loaded = load_tasks(read_tasks(tasks))
    averages = None if gauntlet is None else read_gauntlet(gauntlet)
    if any(task.cfg.icl_task_type == "code_evaluation" for task in loaded) and rank() == 0:
        say_what_is_open()
    say_what_is_left_out(averages, loaded)
    sizes = Sizes(request.batch_size, _length(evaluated, request), request.limit)
    check_tasks(evaluated.tokenizer, loaded, sizes, _recipe_of(evaluated))
    results = evaluate_tasks(
        evaluated.model,
        evaluated.tokenizer,
        loaded,
        sizes,
        gauntlet=averages,
        recipe=_recipe_of(evaluated),
        progress=True,
    )
    counts = {label: len(each) for label, each in results.samples.items()}
    return {"samples": counts, "metrics": results.metrics}, partial(write_samples, results=results)


def _of_recipe(evaluated: EvaluatedModel, request: Request) -> tuple[Found, Samples | None]:
    """Evaluate what the recipe of a checkpoint evaluates."""
    if evaluated.checkpoint is None:
        raise UserError(f"{evaluated.name}: has no recipe that says what to evaluate: give TASKS, --data or --harness")
    recipe = read_state(evaluated.checkpoint)["recipe"]
    found: Found = {"metrics": {}}
    samples: Samples | None = None
    if recipe.get("icl_tasks") is not None:
        found, samples = _tasks(evaluated, request, recipe["icl_tasks"], _gauntlet_of(recipe))
    if any(name.startswith("eval_loader.") for name in recipe):
        loader = read_section(evaluated.checkpoint, "eval_loader", LoaderConfig)
        if (subset := recipe.get("eval_subset_num_batches") or -1) > 0:  # batches of the recipe's size
            request = replace(request, batch_size=recipe["device_eval_batch_size"])
        held_out = _held_out(evaluated, request, loader, subset)
        found |= held_out | {"metrics": found["metrics"] | held_out["metrics"]}
    if not found["metrics"]:
        raise UserError(f"{evaluated.name}: its recipe evaluates nothing: give TASKS, --data or --harness")
    return found, samples


def _gauntlet_of(recipe: dict[str, Any]) -> Any:
    """Give ``eval_gauntlet`` of a flat recipe: a path, a mapping, or None."""
    if "eval_gauntlet" in recipe:
        return recipe["eval_gauntlet"]
    below = {name.partition(".")[2]: value for name, value in recipe.items() if name.startswith("eval_gauntlet.")}
    averages = {name.partition(".")[2]: below.pop(name) for name in [*below] if name.startswith("averages.")}
    return (below | ({"averages": averages} if averages else {})) or None


def _recipe_of(evaluated: EvaluatedModel) -> dict[str, Any]:
    """Read the flat recipe of a checkpoint; empty for a Hugging Face directory."""
    recipe: dict[str, Any] = {} if evaluated.checkpoint is None else read_state(evaluated.checkpoint)["recipe"]
    return recipe


def _length(evaluated: EvaluatedModel, request: Request) -> int:
    if request.max_seq_len is not None:
        _warn_of_length(evaluated, request.max_seq_len)
        return request.max_seq_len
    recipe = _recipe_of(evaluated)
    return int(recipe.get("icl_seq_len") or recipe.get("max_seq_len") or _usual_length(evaluated))


def _usual_length(evaluated: EvaluatedModel) -> int:
    """Give the length of sequences of a model of which no run says it."""
    return min(evaluated.max_positions or MAX_SEQ_LEN, MAX_SEQ_LEN)


def _warn_of_length(evaluated: EvaluatedModel, length: int) -> None:
    """Warn of sequences that are longer than a Hugging Face directory says that they may be."""
    if evaluated.max_positions is not None and length > evaluated.max_positions and rank() == 0:
        longest = f"{evaluated.name}: its config.json says sequences of {evaluated.max_positions} tokens at most"
        print(f"warning: {longest}, and these have up to {length}", file=sys.stderr, flush=True)


def _loader(evaluated: EvaluatedModel, request: Request, directory: Path) -> tuple[LoaderConfig, bool]:
    """Read data as the checkpoint's recipe reads its own, as far as that fits their kind.

    Returns:
        How to read them; and True where no conversation may see another, though the model has no ``document_masking``:
        no recipe says how they are packed.
    """
    summary, recipe = read_corpus_summary(directory), _recipe_of(evaluated)
    length = request.max_seq_len or summary.max_seq_len or recipe.get("max_seq_len") or _usual_length(evaluated)
    said = (recipe.get(f"{loader}.dataset.packing.method") for loader in ("eval_loader", "train_loader"))
    of_recipe = next((PackingMethod(method) for method in said if method), None)
    packing = _packing(summary, of_recipe)
    data = DatasetConfig(str(directory), split=HELD_OUT, shuffle=False, shuffle_seed=0, max_seq_len=length)
    cfg = LoaderConfig(dataset=replace(data, packing=PackingConfig(packing)), drop_last=False)
    return cfg, summary.kind == Kind.instructions and packing != of_recipe


def _packing(summary: CorpusSummary, of_recipe: PackingMethod | None) -> PackingMethod:
    """Choose a way of packing: the recipe's, if it has one that fits the data."""
    if summary.kind == Kind.preferences:
        return PackingMethod.pairs
    if of_recipe not in (None, PackingMethod.pairs) and summary.layout is Layout.documents:
        return of_recipe
    return PackingMethod.best_fit if summary.kind == Kind.instructions else PackingMethod.concat


def _check_tokenizer(evaluated: EvaluatedModel, data: Path) -> None:
    """Refuse data of another vocabulary than the model's."""
    theirs, ours = (load_tokenizer(place).backend.get_vocab() for place in (data / TOKENIZER, evaluated.tokenizer_dir))
    if theirs != ours:
        raise UserError(f"{data}: another tokenizer than the model's made these data: a loss of them means nothing")


def _held_out(
    evaluated: EvaluatedModel, request: Request, cfg: LoaderConfig, subset: int = -1, alone: bool = False
) -> Found:
    """Compute the held-out loss over the first ``subset`` batches of each rank; -1 is all.

    With ``alone``, and of pairs, no document sees another.
    """
    model, length, packing = evaluated.model, cfg.dataset.max_seq_len, cfg.dataset.packing.method
    if alone or packing == PackingMethod.pairs:
        model.cfg.document_masking = True
    if rank() == 0:
        seen = "its own document alone" if model.cfg.document_masking else "all before it in its row"
        line = f"held-out data: rows of {length} tokens, packing {packing}, a token sees {seen}"
        print(line, file=sys.stderr, flush=True)
    _warn_of_length(evaluated, length)
    loader = build_loader(
        cfg,
        batch_size=request.batch_size,
        model_vocab_size=model.cfg.vocab_size,
        documents_of=evaluated.tokenizer_dir if model.cfg.document_masking else None,
        tokenizer=evaluated.tokenizer_dir,
    )
    count = len(loader) if subset < 0 else min(subset, len(loader))
    loss = held_out_loss(model, islice(loader, count), count, progress=True)
    if not loss.targets:
        places = ", ".join(f"{source.local}/{source.split}" for source in cfg.dataset.sources.values())
        cut = f"in rows of {length} tokens"
        raise UserError(f"{places}: no target {cut}, so there is no loss: read longer rows, or evaluate other data")
    read = {"max_seq_len": length, "packing": str(packing), "document_masking": model.cfg.document_masking}
    return {"held_out": read, "metrics": {"metrics/eval/LanguageCrossEntropy": loss.nats}}


def _harness(evaluated: EvaluatedModel, request: Request, names: str) -> tuple[Found, Samples]:
    try:
        from moefoundry.evaluation.harness import HarnessModel, rows_of, run_harness, write_harness_samples
    except ModuleNotFoundError as error:
        raise UserError(f"harness={names}: {error.name} is not installed; the extra eval has it") from error
    batched = BatchedModel(evaluated.model, request.batch_size, progress=True)
    length = _length(evaluated, request)
    model = HarnessModel(batched, evaluated.tokenizer, evaluated.tokenizer_dir, length)
    tasks = names.split(",")
    results = run_harness(model, tasks, request.harness_include, num_fewshot=request.num_fewshot, limit=request.limit)
    metrics = {f"{task}/{name}": value for task, name, value in rows_of(results)}
    return {"metrics": metrics}, partial(write_harness_samples, results=results)


def _humaneval(evaluated: EvaluatedModel, request: Request, path: Path) -> tuple[Found, Samples | None]:
    code, sampling = request.code, _draws(request.code)
    problems = read_problems(path)
    if rank() == 0:
        say_what_is_open()
    chosen = [*problems.values()][: request.limit]
    with saying(str(path)):
        check_tests(chosen)
    completions = complete_problems(
        BatchedModel(evaluated.model, request.batch_size, progress=True),
        evaluated.tokenizer,
        chosen,
        [evaluated.tokenizer.encode(problem.prompt).tolist() for problem in chosen],
        samples=code["samples"],
        sampling=sampling,
        max_new_tokens=code["max_new_tokens"],
    )
    found: Found = {"problems": len(chosen), "samples": len(completions), "output": str(request.output)}
    if rank() != 0:
        return found, None
    results = run_samples(
        problems,
        tqdm(completions, "programs", leave=False, disable=None),
        allow_code_execution=code["allow_code_execution"],
        limits=Limits(seconds=code["timeout"]),
        workers=code["workers"],
    )
    say_what_is_broken(results)
    return found | pass_at_k(results), partial(write_results, results=results)


def _draws(code: dict[str, Any]) -> Sampling:
    """Check the options of generation and return the draws that they ask for."""
    for name in ("samples", "max_new_tokens", "workers"):
        if code[name] < 1:
            raise UserError(f"{name}={code[name]}: must be at least 1")
    if code["samples"] > 1 and code["temperature"] == 0:
        raise UserError(f"samples={code['samples']}: all would be the same without a --temperature above 0")
    try:
        return Sampling(code["temperature"], None, code["top_p"], code["seed"])
    except ValueError as error:
        raise UserError(str(error)) from error
