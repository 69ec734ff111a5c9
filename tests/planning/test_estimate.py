"""Estimates: FLOPs against torch's own counter, times against closed forms, and speeds against published runs."""

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.estimates import ratios
from moefoundry.cli.main import main
from moefoundry.config import load_recipe
from moefoundry.model.transformer import meta_model
from moefoundry.parallel import materialize
from moefoundry.planning.devices import ACCELERATORS
from moefoundry.planning.estimate import CALL_SECONDS, HIDDEN_SHARE, LINK_SHARE, Estimate, estimate
from moefoundry.planning.outline import Outline
from moefoundry.planning.work import block_work, head_work
from tests.conftest import QUICKSTART

H100 = ACCELERATORS["h100"]
SMALL = ["mesh={replicate: 2, shard: 4, expert: 2}", "global_train_batch_size=16", "precision.compute=bf16"]
MLA = "model.attention={kind: mla, n_heads: 4, q_lora_rank: 32, kv_lora_rank: 16, v_head_dim: 24}"


def estimated(*overrides: str, device=H100, world_size: int = 8) -> Estimate:
    return estimate(load_recipe(QUICKSTART, [*SMALL, *overrides], world_size=world_size), world_size, device)


@pytest.mark.parametrize("attention", ["model.attention.n_kv_heads=2", MLA])
def test_flops_are_those_that_torch_counts(attention: str) -> None:
    recipe, seq_len = load_recipe(QUICKSTART, [attention, "model.moe.backend=loop"]), 64
    cfg, blocks = recipe.model, Outline(recipe).blocks
    model = meta_model(cfg).eval()
    materialize(model, "cpu", 17)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq_len, dtype=torch.int64))
    works = [block_work(cfg, index, weights, seq_len, 4) for index, weights in enumerate(blocks)]
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    of_attention = sum(flops for name, flops in counted.items() if "bmm" in name)
    products = sum(work.linear + work.experts for work in works) + head_work(cfg).linear
    assert seq_len * products == sum(counted.values()) - of_attention
    # The counter counts every pair of positions; half of them, and the diagonal, are seen.
    ours = seq_len * sum(work.attention for work in works)
    assert ours == pytest.approx(of_attention * (seq_len + 1) / (2 * seq_len))


def test_exchanges_in_chunks_hide_behind_the_experts() -> None:
    """A quarter of each pass's half of the exchanges stays, and what the experts' products do not hide."""
    whole, cut = estimated(), estimated("model.moe.dispatch_chunks=4")
    calls, more_calls = (
        sum(entry.calls for entry in each.plan.traffic if entry.collective == "all_to_all") for each in (whole, cut)
    )
    exchanged, experts = whole.step.exchange + (more_calls - calls) * CALL_SECONDS, cut.step.experts
    left = max(0.0, exchanged * 3 / 8 - experts / 3) + max(0.0, exchanged * 3 / 8 - experts * 2 / 3)
    assert cut.step.exchange == pytest.approx(exchanged / 4 + left, rel=1e-3)
    assert cut.step.exchange < whole.step.exchange + (more_calls - calls) * CALL_SECONDS
    assert cut.step.experts >= whole.step.experts
    here = [estimated("mesh.expert=1", f"model.moe.dispatch_chunks={chunks}").step for chunks in (1, 4)]
    assert here[0] == here[1], "nothing is exchanged"


def test_a_window_and_recomputation_cost_what_they_should() -> None:
    plain, recomputed = estimated(), estimated("activation_checkpointing=full")
    assert recomputed.flops_per_token == plain.flops_per_token, "work that is done twice is no work of the model"
    assert recomputed.step.experts == pytest.approx(plain.step.experts * (4 - 1 / 3) / 3), "down is read by nothing"
    followed = [estimated("model.norm.position=both", f"activation_checkpointing={mode}") for mode in ("none", "full")]
    assert followed[1].step.experts == pytest.approx(followed[0].step.experts * 4 / 3)
    windowed = estimated("model.attention.sliding_window=16")
    cfg, seq_len = load_recipe(QUICKSTART, []).model, 512
    seen = (16 * 17 / 2 + (seq_len - 16) * 16) / seq_len
    saved = 3 * cfg.n_layers * 4 * cfg.attention.projection_widths(cfg.d_model)[0] * ((seq_len + 1) / 2 - seen)
    assert plain.flops_per_token - windowed.flops_per_token == pytest.approx(saved)
    in_some = estimated("model.attention.sliding_window=16", "model.attention.sliding_window_layers=[0,3,4]")
    assert plain.flops_per_token - in_some.flops_per_token == pytest.approx(saved * 3 / cfg.n_layers)


def test_times_follow_the_device() -> None:
    base = estimated()
    assert base.step.total == pytest.approx(sum(asdict(base.step).values()))
    nodes_of_2 = estimated(device=replace(H100, linked_devices=1))
    assert nodes_of_2.step.exchange > 1.5 * base.step.exchange, "rows that leave a node take the network"
    faster = estimated(device=replace(H100, bf16_tflops=2 * H100.bf16_tflops))
    assert faster.step.products == pytest.approx(base.step.products / 2)
    assert faster.mfu < base.mfu


def test_what_is_done_once_a_step_hides_behind_one_pass() -> None:
    """Gathers behind the first forward pass, reductions behind the last backward pass."""
    slow = replace(H100, link_gb_per_s=0.5)
    sizes = ["global_train_batch_size=64", "device_train_microbatch_size=1"]  # 8 micro-batches

    def seconds(*keys: str) -> tuple[float, dict[str, float]]:
        found = estimated(*sizes, "mesh={replicate: 1, shard: 8, expert: 1}", *keys, device=slow)
        traffic: dict[str, float] = {}
        for entry in found.plan.traffic:
            key = "all_reduce" if entry.axis == "world" else entry.collective
            spent = max(entry.sent / (LINK_SHARE * 0.5e9), 0.0) + entry.calls * CALL_SECONDS
            traffic[key] = traffic.get(key, 0.0) + spent
        step = found.step
        computed = step.products + step.experts + step.other
        return step.sharding, traffic | {"hiding": HIDDEN_SHARE * computed}

    often, both = seconds()
    assert often == pytest.approx(sum(both.values()) - 2 * both["hiding"], rel=1e-6)
    gathered, once = seconds("mesh.gather=each_step")
    assert once["all_gather"] < both["all_gather"] / 10
    assert once["reduce_scatter"] == both["reduce_scatter"]
    first_pass = once["hiding"] / 8 / 3
    assert once["all_gather"] > first_pass
    rest = once["reduce_scatter"] - (once["hiding"] - first_pass)
    assert gathered == pytest.approx(once["all_gather"] - first_pass + rest, rel=1e-6)
    reduced, once = seconds("mesh.gather=each_step", "mesh.reduce=each_step")
    assert once["reduce_scatter"] > 2 * first_pass
    assert reduced == pytest.approx(once["all_gather"] + once["reduce_scatter"] - 3 * first_pass, rel=1e-6)
    assert reduced < gathered < often


def test_shared_experts_hide_a_part_of_the_exchange_and_few_rows_an_expert_cost_more() -> None:
    base, none = estimated("model.moe.num_shared_experts=2"), estimated("model.moe.num_shared_experts=0")
    assert 0 < base.step.exchange < none.step.exchange
    more = estimated("max_seq_len=4096")
    few = estimated("max_seq_len=4096", "device_train_microbatch_size=1")
    assert few.plan.rows_per_expert * 2 == more.plan.rows_per_expert == 2048
    assert few.step.experts / more.step.experts == pytest.approx((1 + 64 / 1024) / (1 + 64 / 2048))


def test_attention_with_a_mask_runs_over_all_pairs() -> None:
    plain, windowed = estimated("max_seq_len=2048"), estimated("max_seq_len=2048", "model.attention.sliding_window=16")
    assert windowed.flops_per_token < plain.flops_per_token
    assert windowed.step.products > plain.step.products


def test_the_length_of_the_run() -> None:
    tokens = estimated("max_duration=8388608tok")
    batches = estimated("max_duration=1024ba")
    assert tokens.run_tokens == batches.run_tokens == 1024 * 16 * 512
    seconds = 1024 * batches.step.total
    assert batches.days == pytest.approx(seconds / 86400)
    assert estimated("max_duration=1ep").days is None


def test_the_command(tmp_path: Path, capsys) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("\n".join(f"{name}: {value}" for name, value in asdict(H100).items()))
    command = ["estimate", str(QUICKSTART), *SMALL, "--world-size", "8"]
    assert main([*command, "--gpu", str(own), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"]["step"] == pytest.approx(estimated().step.total)
    assert main([*command, "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "tokens/s a device" in out
    assert "at 2 a device and hour" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "unknown; known are a100, h100"),
        ("bf16_tflops: 1", "fp8_tflops, link_gb_per_s"),
        ("- 1", "the top level is a list"),
    ],
)
def test_an_unknown_device_is_one_line(text: str | None, message: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["estimate", str(QUICKSTART), "--world-size", "1", "--gpu", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_published_runs() -> None:
    found = [ratio for _, _, ratio in ratios()]
    assert statistics.median(abs(ratio - 1) for ratio in found) <= 0.25
    assert all(0.5 < ratio < 2 for ratio in found)


def test_the_steps_of_every_stage_add_up() -> None:
    stages = "curriculum={short: {until: 30ba, max_seq_len: 128}, long: {}}"
    both, short, long = estimated(stages, "max_duration=40ba"), estimated("max_seq_len=128"), estimated()
    assert both.run_tokens == 16 * (30 * 128 + 10 * 512)
    assert both.days == pytest.approx((30 * short.step.total + 10 * long.step.total) / 86400)
    assert both.plan.stage == "long"
    assert both.step == long.step
    assert replace(both.plan, stage="") == long.plan
