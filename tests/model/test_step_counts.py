"""Operators, memory and waits of a training step on a GPU, counted on the meta device."""

import json

import pytest

from tests.model import step_counts


@pytest.fixture(scope="module")
def counted() -> dict[str, object]:
    return step_counts.counted()


def test_each_block_and_a_step_do_what_the_table_says(counted: dict[str, object]) -> None:
    golden = json.loads(step_counts.GOLDEN.read_text())
    assert counted == golden, "a change of these counts is made with: python -m tests.model.step_counts --update"


def test_fused_experts_keep_less_and_launch_less(counted: dict[str, dict[str, object]]) -> None:
    rows, fused = counted["grouped_mm"], counted["triton"]
    assert fused["kept_bytes_a_token"] < 0.65 * rows["kept_bytes_a_token"]
    assert all(few < many for few, many in zip(fused["operators"], rows["operators"], strict=True))


def test_a_wait_of_the_host_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.moe.router import Router

    forward = Router.forward

    def waits(self: Router, *args: object, **options: object) -> object:
        routed = forward(self, *args, **options)
        int(routed.topk_expert_ids[0, 0])
        return routed

    monkeypatch.setattr(Router, "forward", waits)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):
        step_counts.step("grouped_mm", 1)


def test_only_the_check_of_a_step_waits_for_the_device() -> None:
    run = step_counts.WholeStep("triton", 1)
    with step_counts.as_on_a_gpu() as launches:
        counts = run.run(launches)  # would fail at any other wait
        assert counts["optimizer"]["triton:adamw"] == len(list(run.model.parameters()))
        with pytest.raises(RuntimeError, match=r"[Mm]eta"):
            run.finite.after_train_batch(run.state, run.state)
