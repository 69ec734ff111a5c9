"""Build the parts of a run from its recipe. Read :func:`build_trainer` and :func:`assemble`: all of it, in order."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from composer import DataSpec, Evaluator
from composer.core import Algorithm, Callback
from composer.devices import Device
from composer.loggers import LoggerDestination
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig

from moefoundry import composer_patches
from moefoundry.adapters import apply_lora
from moefoundry.callbacks.checkpointing import Checkpointing
from moefoundry.callbacks.console import Console
from moefoundry.callbacks.curriculum import Curriculum
from moefoundry.callbacks.data import DataMonitor
from moefoundry.callbacks.ema import Ema
from moefoundry.callbacks.expert_bias import ExpertBias
from moefoundry.callbacks.health import FiniteCheck, GradientNorm
from moefoundry.callbacks.indexer import IndexerMonitor
from moefoundry.callbacks.learning_rate import LearningRate
from moefoundry.callbacks.live_view import LiveView, has_its_own_terminal
from moefoundry.callbacks.metrics_file import MetricsFile
from moefoundry.callbacks.micro_batches import MicroBatches
from moefoundry.callbacks.nonfinite import NonFiniteSearch
from moefoundry.callbacks.preferences import PreferenceMonitor
from moefoundry.callbacks.routing import GlobalBatchBalance, RoutingMonitor
from moefoundry.callbacks.signals import StopOnSignal
from moefoundry.callbacks.speed import Utilization
from moefoundry.callbacks.trackers import build_trackers, note_entries, start_trackers, try_trackers
from moefoundry.checkpoint.base import digest_of_tensors
from moefoundry.checkpoint.ranks import on_rank_zero, together
from moefoundry.checkpoint.run_dir import CONFIG_FILE, DOWNLOADS, claim_run_dir, open_run, store_of
from moefoundry.checkpoint.save import Saver, retain_and_upload
from moefoundry.checkpoint.start import Start, data_digests
from moefoundry.checkpoint.state import RunState
from moefoundry.checkpoint.store import Retention
from moefoundry.composer_patches import MeshTrainer
from moefoundry.config import Compute, ConfigError, LoaderConfig, Recipe, UserError, flatten
from moefoundry.config.curriculum import stages_of
from moefoundry.config.making import make_part, make_parts
from moefoundry.config.tasks import TASKS_KEY
from moefoundry.config.urls import is_url, resolved
from moefoundry.data.fit import report_problems, tokenizer_problems
from moefoundry.data.loader import build_loader
from moefoundry.data.reference import read_reference
from moefoundry.data.sources import read_lengths
from moefoundry.data.stores import Remote
from moefoundry.evaluation.tasks.callback import IclTasks
from moefoundry.foundry import ComposerDPO, ComposerMoECausalLM, CountTargets, count_tokens, with_counts
from moefoundry.mesh import Meshes
from moefoundry.model.losses import build_losses
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.moe.deep_ep import check_dispatcher
from moefoundry.moe.mixture import check_backend
from moefoundry.ops.kernel_choice import use_fused_kernels
from moefoundry.parallel import materialize, moe_layer_indices, moe_layers, parallelize
from moefoundry.planning.describe import count_parameters
from moefoundry.planning.devices import known_device
from moefoundry.planning.micro_batch import with_sizes
from moefoundry.planning.this_device import sizes_here
from moefoundry.planning.work import flops_per_token
from moefoundry.precision import describe_fp8
from moefoundry.world import degrees_of, device_of_rank, setup_meshes, torch_device


class Phase(Enum):
    """Places of a run's callbacks in the order in which every event reaches them."""

    PREPARE = "set targets, rate and counts that the batch and every callback after it go by"
    GRADIENTS = "measure and clip gradients"
    CHECK = "stop or skip a step whose measured norm is not finite, before anything acts on its gradients"
    OBSERVE = "look at a batch, balance experts; the recipe's own callbacks"
    STOP = "end training on a signal, before the save that such an end brings"
    SAVE = "save, and put a saved state back"
    AVERAGE = "average parameters in a thread, when no callback changes them any more"


def build_trainer(recipe: Recipe) -> MeshTrainer:
    """Assemble the run.

    Raises:
        UserError: Something the user can put right, named; ``run_dir`` is as it was.
    """
    try:
        return assemble(recipe)
    except BaseException:
        if dist.get_global_rank() == 0:
            shutil.rmtree(Path(recipe.run_dir, DOWNLOADS), ignore_errors=True)
        raise


def assemble(recipe: Recipe) -> MeshTrainer:
    """Build all parts, and claim ``run_dir`` when nothing is left that can fail."""
    composer_patches.apply()
    use_fused_kernels(recipe.fused_kernels)
    device = device_of_rank()
    meshes = setup_meshes(recipe, device)
    recipe, micro_batches = build_micro_batches(recipe, device)
    on_rank_zero(lambda: try_services(recipe))
    train_data = build_data(recipe.train_loader, recipe, recipe.global_train_batch_size // dist.get_world_size())
    eval_data = recipe.eval_loader and build_data(recipe.eval_loader, recipe, recipe.device_eval_batch_size)
    if problems := [*tokenizer_problems(recipe), *report_problems(recipe)]:
        raise ConfigError(problems)
    model = build_model(recipe, meshes, device)
    digests = on_rank_zero(lambda: data_digests(recipe))
    run_dir, start = open_run(recipe, digests)
    if recipe.dpo is not None:
        on_rank_zero(lambda: check_reference(recipe, start))
    materialize(model, torch_device(device), recipe.seed)
    metrics_file = MetricsFile(run_dir)
    trainer = MeshTrainer(
        model=wrapped(recipe, model),
        optimizers=make_part("optimizers", recipe.optimizer.name, "optimizer", recipe.optimizer, model, recipe),
        train_dataloader=train_data,
        eval_dataloader=(evaluators := build_evaluators(recipe, eval_data)),
        eval_subset_num_batches=recipe.eval_subset_num_batches,
        eval_interval=recipe.eval_interval if evaluators else 0,
        max_duration=recipe.max_duration,
        device_train_microbatch_size=recipe.device_train_microbatch_size,
        callbacks=build_callbacks(recipe, model, metrics_file, digests, start, micro_batches),
        algorithms=make_parts("algorithms", Algorithm, recipe.algorithms, recipe),
        loggers=[metrics_file, *build_console(recipe, model)],
        parallelism_config=None if meshes is None else ParallelismConfig(fsdp2=FSDP2Config()),
        precision="fp32",  # the model's own: see precision.py
        device=device,
        run_name=recipe.run_name,
        seed=recipe.seed,
        dist_timeout=recipe.dist_timeout,
        progress_bar=False,
        log_to_console=False,
        spin_dataloaders=False,
    )
    trainer.recipe, trainer.meshes = recipe, meshes
    kinds = (NonFiniteSearch, MicroBatches)
    trainer.around = [each.repeating for kind in kinds for each in trainer.state.callbacks if isinstance(each, kind)]
    if micro_batches is not None:
        trainer.on_trial = micro_batches.on_trial
    continues = start is not None and start.own
    with together():
        trackers = build_trackers(recipe.loggers, run_dir, continues)
        start_trackers(trackers, trainer.state, trainer.logger)
    on_rank_zero(lambda: claim_run_dir(recipe))
    metrics_file.begin(trainer.state.timestamp.batch.value if continues else 0)
    note_entries(trackers, run_dir)
    return trainer


def try_services(recipe: Recipe) -> None:
    """Ask every service outside once, and briefly, whether it can be used; one rank calls it.

    Raises:
        UserError: One cannot.
    """
    if recipe.save_remote is not None:
        try:
            Remote(recipe.save_remote).try_writing()
        except UserError as error:
            raise UserError(f"save_remote: {error}") from error
    if recipe.load_path is not None and is_url(resolved(recipe.load_path)):
        Remote(recipe.load_path).try_reading()
    try_trackers(recipe.loggers)


def build_model(recipe: Recipe, meshes: Meshes | None, device: Device) -> MoETransformer:
    """Build the model for ``device``, sharded, on meta: what cannot be built is found before anything is written."""
    place = torch_device(device)
    if recipe.precision.fp8.recipe is not None:
        describe_fp8(recipe.precision.fp8, place)
    dtype = torch.bfloat16 if recipe.precision.compute == Compute.bf16 else torch.float32
    check_backend(recipe.model.moe, recipe.model.d_model, place, dtype)
    if meshes is not None and meshes.expert.size() > 1:
        check_dispatcher(recipe.model.moe, place, dtype)
    model = meta_model(recipe.model)
    if recipe.lora is not None:
        apply_lora(model, recipe.lora)
    model.use_losses(build_losses(recipe.losses))
    model.tells_rows_apart = bool(stream_names(recipe.train_loader) or stream_names(recipe.eval_loader))
    parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing, recipe.compile)
    return model


def check_reference(recipe: Recipe, start: Start | None) -> None:
    """Check that all pairs have been scored, and where a run begins with weights alone, by them.

    A run that goes on has been compared with what its checkpoint was saved with: :func:`data_digests`.

    Raises:
        UserError: They have not.
    """
    begins = digest_of_tensors(start.checkpoint) if start is not None and start.weights_only else None
    for loader in (recipe.train_loader, recipe.eval_loader):
        for source in () if loader is None else loader.dataset.sources.values():
            place = Path(source.local, str(source.split))
            _, of = read_reference(place, len(read_lengths(place)) // 2)
            if begins is not None and of != begins:
                raise UserError(
                    f"{place}: its log-probabilities are of another checkpoint than load_path; compute them again: "
                    f"moefoundry reference {recipe.load_path} {source.local}"
                )


def wrapped(recipe: Recipe, model: MoETransformer) -> ComposerMoECausalLM:
    """Wrap the model for Composer, with what it is trained for."""
    sources = stream_names(recipe.eval_loader)
    return ComposerMoECausalLM(model, sources) if recipe.dpo is None else ComposerDPO(model, recipe.dpo.beta, sources)


def build_data(cfg: LoaderConfig, recipe: Recipe, batch_size: int) -> DataSpec:
    """Build the loader of this rank's batches: of ``batch_size`` sequences, or for training as a curriculum says."""
    loader = build_loader(
        cfg,
        batch_size=batch_size,
        model_vocab_size=recipe.model.vocab_size,
        documents_of=Path(recipe.tokenizer.name) if recipe.model.document_masking else None,
        tokenizer=Path(recipe.tokenizer.name),
        stages=stages_of(recipe) if recipe.curriculum and cfg is recipe.train_loader else (),
    )
    if dist.get_global_rank() == 0:
        for line in loader.dataset.describe_packing():
            print(f"packing: {line}", file=sys.stderr, flush=True)
    counting = partial(with_counts, document_masking=recipe.model.document_masking)
    return DataSpec(loader, batch_transforms=counting, get_num_tokens_in_batch=count_tokens)


def build_evaluators(recipe: Recipe, eval_data: DataSpec | None) -> list[Evaluator]:
    """Build what Composer evaluates; one without data lets it come to :class:`IclTasks` where there are only these."""
    if eval_data is not None:
        return [Evaluator(label="eval", dataloader=eval_data)]
    if recipe.icl_tasks is None:
        return []
    return [Evaluator(label=TASKS_KEY, dataloader=[], metric_names=[], device_eval_microbatch_size=1)]


def stream_names(cfg: LoaderConfig | None) -> list[str]:
    """List the streams of a loader in the order in which its batches number them; empty if they do not."""
    return list(cfg.dataset.sources) if cfg is not None and cfg.dataset.streams else []


def build_callbacks(
    recipe: Recipe,
    model: MoETransformer,
    metrics_file: MetricsFile,
    digests: Mapping[str, str],
    start: Start | None,
    micro_batches: MicroBatches | None = None,
) -> list[Callback]:
    """Build the run's callbacks, in the order of :class:`Phase`; ``digests`` are those of the run's data."""
    clipping = recipe.algorithms.gradient_clipping
    gradient_norm = GradientNorm(clipping.clipping_threshold if clipping else None)
    ema = Ema(recipe.ema) if recipe.ema else None
    source_tokens: dict[str, int] = {}
    checkpointing = build_checkpointing(recipe, metrics_file, digests, start, ema, source_tokens)
    phases: dict[Phase, list[Callback | None]] = {
        Phase.PREPARE: [
            Curriculum(stages_of(recipe)) if recipe.curriculum else None,
            micro_batches,
            CountTargets(),
            LearningRate(recipe, start.schedule_changes if start else ""),
            GlobalBatchBalance(model.step_counts) if model.step_counts else None,
        ],
        Phase.GRADIENTS: [gradient_norm],
        Phase.CHECK: [
            FiniteCheck(gradient_norm, recipe.nonfinite),
            NonFiniteSearch(Path(recipe.run_dir), checkpointing.run),
        ],
        Phase.OBSERVE: [
            DataMonitor(stream_names(recipe.train_loader), source_tokens),
            RoutingMonitor(metrics_file.record, moe_layer_indices(model)),
            build_expert_bias(model),
            IndexerMonitor() if recipe.model.attention.trained_indexer else None,
            IclTasks(recipe) if recipe.icl_tasks is not None else None,
            PreferenceMonitor() if recipe.dpo is not None else None,
            *make_parts("callbacks", Callback, recipe.callbacks, recipe),
            build_utilization(recipe, metrics_file),
        ],
        Phase.STOP: [StopOnSignal()],
        Phase.SAVE: [checkpointing],
        Phase.AVERAGE: [ema],
    }
    return [callback for phase in Phase for callback in phases[phase] if callback]


def build_micro_batches(recipe: Recipe, device: Device) -> tuple[Recipe, MicroBatches | None]:
    """Choose the micro-batches that the recipe leaves to the run; None where it leaves none."""
    run_dir = Path(recipe.run_dir)
    sizes = sizes_here(recipe, torch_device(device), dist.get_local_world_size(), run_dir / CONFIG_FILE)
    if not sizes:
        return recipe, None
    if dist.get_global_rank() == 0:
        for stage, size in sizes.items():
            print(f"device_train_microbatch_size: auto is {size}{f' in stage {stage}' * bool(stage)}", file=sys.stderr)

    def keep(sizes: Mapping[str, int]) -> None:
        on_rank_zero(lambda: claim_run_dir(with_sizes(recipe, sizes)))

    return with_sizes(recipe, sizes), MicroBatches(stages_of(recipe), sizes, keep, recipe.dist_timeout)


def build_utilization(recipe: Recipe, metrics_file: MetricsFile) -> Utilization | None:
    """Build the callback that logs the MFU; None where the device's peak is not known, and for adapters."""
    device = known_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if device is None or recipe.precision.compute != Compute.bf16 or recipe.lora is not None:
        return None
    peak = device.bf16_tflops if recipe.precision.fp8.recipe is None else device.fp8_tflops
    flops = flops_per_token(recipe.model, recipe.max_seq_len)
    return Utilization(flops, peak * 1e12, metrics_file.values)


def build_checkpointing(
    recipe: Recipe,
    metrics_file: MetricsFile,
    digests: Mapping[str, str],
    start: Start | None,
    ema: Ema | None,
    source_tokens: dict[str, int],
) -> Checkpointing:
    """Build the callback that saves, and the state that it saves."""
    every, best = recipe.save_keep_every, recipe.save_keep_best
    retention = Retention(
        newest=recipe.save_num_checkpoints_to_keep,
        every=None if every is None else int(every.removesuffix("ba")),
        best=best,
    )
    degrees, store = degrees_of(recipe), store_of(Path(recipe.run_dir))
    run = RunState(
        recipe=flatten(recipe),
        mesh={"replicate": degrees.replicate, "shard": degrees.shard, "expert": degrees.expert},
        data_digests=digests,
        averages=ema,
        base=start.base if start else None,
        metrics=dict if best is None else partial(metrics_file.values, (best,)),
        source_tokens=source_tokens,
    )
    saver = Saver(store, partial(retain_and_upload, store, retention, recipe.save_remote))
    return Checkpointing(run, saver, recipe.save_interval, recipe.save_async, start)


def build_expert_bias(model: MoETransformer) -> ExpertBias | None:
    """Build the callback that moves the experts' biases; None where they stay as they are, as frozen routers do."""
    balance, routers = model.cfg.moe.balance, [layer.router for layer in moe_layers(model)]
    frozen = not any(router.gate.weight.requires_grad for router in routers)
    if frozen or not balance.bias_update_rate:
        return None
    return ExpertBias(routers, balance.bias_update_rate, balance.bias_freeze_at)


def build_console(recipe: Recipe, model: MoETransformer) -> list[LoggerDestination]:
    """Build what shows the run to people: lines, or a live view on a terminal that only rank 0 writes to."""
    if not (recipe.log_to_console or recipe.progress_bar):
        return []
    live = recipe.progress_bar and has_its_own_terminal()
    ranks = dist.get_world_size()
    title = f"{recipe.run_name}: {count_parameters(recipe.model, recipe.lora)}; {ranks} rank{'s' if ranks > 1 else ''}"
    if recipe.precision.fp8.recipe is not None:
        title += f"; FP8 {describe_fp8(recipe.precision.fp8, next(model.parameters()).device)}"
    lines = recipe.log_to_console and not live
    console = Console(title if recipe.log_to_console else "", recipe.console_log_interval if lines else None)
    return [console, *([LiveView(Path(recipe.run_dir))] if live and dist.get_global_rank() == 0 else [])]
