"""Runs on a GPU that is only pretended (``fake_gpu.py``): no tensor of it meets one of the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.config import load_recipe
from tests.distributed import run_distributed
from tests.evaluation.tiny_tasks import write_tasks
from tests.fake_gpu import pretend_a_gpu
from tests.train.runs import Run, run_recipe
from tests.train.test_finetuning import run_all

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "set_reduce_scatter_max_input_buffers"),
    reason="torch before 2.14 asks the driver, which is not there, for what these tests pretend",
)

Overrides = Callable[..., list[str]]
BF16 = "precision.compute=bf16"
ONE_STEP = ("max_duration=2ba", "global_train_batch_size=4", "eval_subset_num_batches=1", "eval_interval=2ba")
LATENT = (
    "model.attention={kind: mla, n_heads: 4, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, "
    "qk_rope_head_dim: 4, v_head_dim: 8, indexer: {top_k: 8, n_heads: 2, head_dim: 8, stage: %s}}"
)
LINEAR = "{layers: [0, 1], n_key_heads: 2, n_value_heads: 4, key_head_dim: 6, value_head_dim: 10}"

EVERYTHING_ELSE = (
    "ema={decay: 0.5, evaluate: true}",
    "save_interval=1ba",
    "callbacks={system_monitor: {every: 1}, report: {prompt: def, max_new_tokens: 4}}",
    "algorithms.gradient_clipping={clipping_threshold: 0.1}",
    "device_train_microbatch_size=auto",
    "nonfinite=skip",
)
"""What a run has beside its model."""

RUNS = {
    "documents, sinks, a window, prediction": [
        *(BF16, "fused_kernels=true", "model.document_masking=true", "model.mtp={depth: 2}"),
        "model.attention={n_heads: 4, n_kv_heads: 2, sinks: true, sliding_window: 16, sliding_window_layers: [0, 1]}",
        "precision.optimizer_moments=bf16_stochastic",
    ],
    "sigmoid, groups, a bias, jitter": [
        "model.moe.router={score_function: sigmoid, num_groups: 2, input_jitter: 0.1, gate_bias: true}",
        "model.moe.balance={bias_update_rate: 0.01, aux_loss_scope: global_batch}",
        *(BF16, "activation_checkpointing=full", "algorithms.gradient_clipping={clipping_threshold: 0.1}"),
    ],
    "FP8, selective checkpointing": [BF16, "precision.fp8.recipe=deepseek_v3", "activation_checkpointing=selective"],
    "an indexer": [LATENT % "sparse", "activation_checkpointing=full"],
    "linear attention": [f"model.linear_attention={LINEAR}", "model.document_masking=true", BF16],
    "sparsemixer, capacity": [
        "model.moe.router.score_function=sparsemixer",
        *("model.moe.capacity_factor=1.0", "model.moe.projection_bias=true", "model.moe.shared_expert_gate=true"),
        *("precision.compute=bf16_emulated", "precision.optimizer_moments=bf16"),
    ],
}
MORE_RUNS = {
    "streams": [
        "train_loader.dataset={streams: {a: {local: CORPUS, proportion: 0.5}, b: {local: CORPUS, proportion: 0.5}}}",
        "eval_loader.dataset={streams: {a: {local: CORPUS}, b: {local: CORPUS}}}",
        "tokenizer.name=CORPUS/tokenizer",
    ],
    "FP8 by rows": [BF16, "precision.fp8.recipe=rowwise"],
    "FP8 by tensors": ["precision.fp8.recipe=tensorwise", "activation_checkpointing=full"],
    "FP8 recomputed": [BF16, "precision.fp8.recipe=deepseek_v3", "activation_checkpointing=full"],
    "an indexer warms up": [LATENT % "warm_up", "model.document_masking=true"],
    "an indexer is frozen": [LATENT % "frozen", BF16],
    "sinks without kernels": [
        "model.attention={n_heads: 4, n_kv_heads: 2, sinks: true, sliding_window: 16}",
        "model.document_masking=true",
    ],
    "norms, biases, ties": [
        "model.attention={n_heads: 4, n_kv_heads: 2, qk_norm: head, bias: all}",
        *("model.norm.position=both", "model.tie_embeddings=true", "model.head_bias=true", BF16),
    ],
    "uniform, by a loop": ["model.moe.router.assignment=uniform", "model.moe.backend=loop"],
    "micro-batches balance": ["model.moe.balance.aux_loss_scope=micro_batch", "model.moe.top_k=1"],
    "YaRN": ["model.attention.yarn={factor: 4, original_max_seq_len: 16}"],
    "LongRoPE, generation past its length": [
        "model.attention.longrope={original_max_seq_len: 16, short_factors: [1, 1, 1, 1], long_factors: [1, 2, 3, 4]}",
        "callbacks.report={prompt: def value return value, max_new_tokens: 24}",
    ],
    "a step that is not finite": ["nonfinite=skip", "optimizer.lr=1e30", "max_duration=3ba"],
}

TWO_RANKS = {
    "FP8, gradients reduced once": [
        *(BF16, "precision.fp8.recipe=deepseek_v3", "mesh={expert: 2, reduce: each_step}"),
        "activation_checkpointing=full",
    ],
    "FP8 shards": [BF16, "precision.fp8.recipe=deepseek_v3"],
    "chunks": [
        *(BF16, "mesh.expert=2", "model.moe.dispatch_chunks=2", "model.mtp={depth: 1}"),
        "precision.optimizer_moments=bf16_stochastic",
    ],
    "copies": [
        *("mesh={replicate: 2, shard: 1}", "model.document_masking=true", "ema={decay: 0.5, evaluate: true}"),
        "model.moe.balance.aux_loss_scope=global_batch",
    ],
    "gathered once": [
        *(BF16, "mesh={gather: each_step, expert: 2}", "model.moe.capacity_factor=1.0", "model.tie_embeddings=true"),
        "activation_checkpointing=selective",
    ],
    "an indexer": [LATENT % "sparse", BF16, "mesh.expert=2"],
}


def trained(overrides: Overrides, run_dir: Path, *changes: str, world_size: int = 1) -> Run:
    """Train on pretended GPUs; attention and data take the place of the tiny recipe's."""
    mappings = tuple(change.partition("={")[0] for change in changes if "={" in change)
    tiny = [*overrides(run_dir), *ONE_STEP]
    (corpus,) = (each.partition("=")[2] for each in tiny if each.startswith("train_loader.dataset.local="))
    kept = [
        each
        for each in tiny
        if not each.startswith(("model.attention", "train_loader.dataset")) or not each.startswith(mappings)
    ]
    recipe = load_recipe(None, [*kept, *(change.replace("CORPUS", corpus) for change in changes)])
    return run_recipe(recipe, world_size, before=pretend_a_gpu)


def meetings() -> dict[str, str]:
    """What becomes of tensors of the GPU and of the host: the device of a result, or the error's name."""
    pretend_a_gpu()
    gpu, host = torch.ones(3, device="cuda", requires_grad=True), torch.ones(3, requires_grad=True)
    values, group = gpu.detach(), dist.new_group(backend="gloo")
    (gpu * host.cuda()).sum().backward()
    tries: dict[str, Callable[[], Tensor | None]] = {
        "copy": lambda: torch.empty(3).copy_(values),
        "gradient of gpu": lambda: gpu.grad,
        "gradient of host": lambda: host.grad,
        "module": lambda: torch.nn.Linear(2, 2).to("cuda").weight,
        "new_tensor": lambda: values.new_tensor([1.0]),
        "scalar of the host": lambda: values * torch.tensor(2.0),
        "indices of the host": lambda: values[torch.tensor([0])],
        "indices of the GPU": lambda: torch.ones(3)[torch.tensor([0], device="cuda")],
        "sum": lambda: values + torch.ones(3),
        "sum into the host": lambda: torch.zeros(()).add_(values.sum()),
        "scalar of the GPU": lambda: values.sum() * torch.ones(3),
        "concatenation": lambda: torch.stack([values.sum(), torch.ones(())]),
        "generator": lambda: torch.empty(3, device="cuda").normal_(generator=torch.Generator()),
        "array": lambda: torch.from_numpy(values.numpy()),
        "NCCL": lambda: dist.all_reduce(values) or values,
        "NCCL, host": lambda: dist.all_reduce(torch.ones(3)),
        "gloo": lambda: dist.all_reduce(torch.ones(3), group=group) or torch.ones(3),
        "gloo, GPU": lambda: dist.all_reduce(values, group=group),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            found[name] = str(attempt().device)  # type: ignore[union-attr]
        except (RuntimeError, TypeError) as error:
            found[name] = type(error).__name__
    return found


def test_what_meets_on_a_pretended_gpu_is_what_cuda_lets_meet() -> None:
    found = run_distributed(meetings, 1)[0]
    of_gpu = {"gradient of gpu", "module", "new_tensor", "scalar of the host", "indices of the host", "NCCL"}
    assert {name for name, outcome in found.items() if outcome == "cuda:0"} == of_gpu
    assert {name for name, outcome in found.items() if outcome == "cpu"} == {"copy", "gradient of host", "gloo"}
    refused = {name: outcome for name, outcome in found.items() if outcome not in ("cuda:0", "cpu")}
    assert refused.pop("array") == "TypeError"
    assert set(refused.values()) == {"DevicesDifferError"}


@pytest.mark.parametrize(
    "changes",
    [*RUNS.values(), *(pytest.param(changes, marks=pytest.mark.slow) for changes in MORE_RUNS.values())],
    ids=[*RUNS, *MORE_RUNS],
)
def test_a_run(tiny_overrides: Overrides, tmp_path: Path, changes: list[str]) -> None:
    run = trained(tiny_overrides, tmp_path / "run", *changes)
    assert all(line["memory/peak_device_gib"] == 0.5 for line in run.metrics)
    assert math.isfinite(run.metrics[1]["metrics/eval/LanguageCrossEntropy"]) or "nonfinite=skip" in changes


def test_ranks_share_experts_and_go_on_from_a_checkpoint(tiny_overrides: Overrides, tmp_path: Path) -> None:
    """With the callbacks and the parts of a run that are no model's."""
    changes = [*EVERYTHING_ELSE, BF16]
    run = trained(tiny_overrides, tmp_path / "run", *changes, "mesh.expert=2", world_size=2)
    assert run.metrics[0]["system/gpu_percent"] == 50
    resumed = trained(tiny_overrides, tmp_path / "on", *changes, f"load_path={run.run_dir}/checkpoints/ba1")
    assert resumed.metrics[-1]["loss/train/total"] == pytest.approx(run.metrics[-1]["loss/train/total"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", TWO_RANKS.values(), ids=TWO_RANKS)
def test_two_ranks(tiny_overrides: Overrides, tmp_path: Path, changes: list[str]) -> None:
    changes = [*changes, "device_train_microbatch_size=1", "save_interval=1ba"]
    run = trained(tiny_overrides, tmp_path / "run", *changes, world_size=2)
    start = f"load_path={run.run_dir}/checkpoints/ba1"
    resumed = trained(tiny_overrides, tmp_path / "on", *changes, start, world_size=2)
    assert resumed.metrics[-1]["batch"] == 2


@pytest.mark.slow
def test_tasks_inside_training(tiny_overrides: Overrides, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    run = trained(tiny_overrides, tmp_path / "run", f"icl_tasks={tasks}", f"eval_gauntlet={tasks}", "icl_seq_len=256")
    assert any(name.startswith("icl/metrics/eval_gauntlet") for name in run.metrics[-1])


def every_command(root: Path, corpus: Path) -> dict[str, object]:
    pretend_a_gpu()
    return run_all(root, corpus)


@pytest.mark.slow
def test_finetuning_by_preferences_and_its_evaluations(tiny_corpus: Path, tmp_path: Path) -> None:
    found = run_distributed(every_command, 1, tmp_path, tiny_corpus, timeout=180)[0]
    for name in ("finetune", "unpacked", "generate", "reference", "dpo", "fork", "eval_chats", "eval_pairs"):
        assert found[name][0] == 0, found[name]


@pytest.mark.slow
def test_adapters(tiny_overrides: Overrides, tmp_path: Path) -> None:
    base = trained(tiny_overrides, tmp_path / "base")
    lora = ("lora={rank: 8, alpha: 8, dora: true, dropout: 0.1}", "activation_checkpointing=full", "ema={decay: 0.5}")
    adapted = trained(tiny_overrides, tmp_path / "run", *lora, BF16, f"load_path={base.run_dir}")
    trained(tiny_overrides, tmp_path / "on", *lora, BF16, f"load_path={adapted.run_dir}", "max_duration=3ba")
