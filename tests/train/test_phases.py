"""The recipes of docs/training.md that begin with a checkpoint, and what its data must be.

``first`` has 6 batches an epoch, and is saved in its batches 2, 4, 6 and 8.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.config import Recipe, UserError
from moefoundry.data.prepare import PrepareOptions, prepare
from tests.checkpoint.forge import recommit
from tests.distributed import captured_output, run_distributed
from tests.train.runs import Run, finished, run_recipe

Tiny = Callable[..., Recipe]
DECAY = 0.75
STEPS = (
    "max_duration=8ba",
    "save_interval=2ba",
    "save_num_checkpoints_to_keep=-1",
    "scheduler={name: constant_with_warmup, t_warmup: 2ba}",
    "eval_interval=3ba",
    f"ema={{decay: {DECAY}}}",
)
PARAMETER = "model.layers.1.ffn.experts.gate_proj"
STEP = f"optimizer/{PARAMETER}/step"


def train_and_look(recipe: Recipe) -> tuple[list[str], list[int]]:
    """What was printed, and for each batch a number that tells its samples from others."""
    from composer.core import Callback

    from moefoundry import build as parts
    from moefoundry.trainer import train

    seen: list[int] = []

    class Look(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            tokens = state.batch["input_ids"]
            seen.append(int((tokens * torch.arange(1, tokens.numel() + 1).view_as(tokens)).sum()))

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Look()]
    with captured_output() as texts:
        train(recipe)
    return texts, seen


class Seen(Run):
    """A run, and its samples."""

    samples: list[int]


def run(recipe: Recipe) -> Seen:
    (out, err), samples = run_distributed(train_and_look, 1, recipe)[0]
    seen = Seen(*finished(Path(recipe.run_dir), out, err))
    seen.samples = samples
    return seen


def stored(run: Run, batch: int, name: str = f"model/{PARAMETER}") -> Tensor:
    return StoredTensors(run.run_dir / "checkpoints" / f"ba{batch}", "").read(name)


def load_path(run: Run, batch: int) -> str:
    return f"load_path={run.run_dir / 'checkpoints' / f'ba{batch}'}"


@pytest.fixture(scope="module")
def first(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run(tiny_recipe(tmp_path_factory.mktemp("first") / "run", *STEPS))


@pytest.fixture(scope="module")
def other_corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, with the tokenizer of ``tiny_corpus``."""
    root, words = tmp_path_factory.mktemp("other"), random.Random(1)
    for number in range(30):
        (root / f"{number}.txt").write_text(" ".join(words.choices(["value", "return", "def", "inner"], k=500)))
    tokenizer = tiny_corpus / "tokenizer"
    prepare(PrepareOptions(str(root), root / "corpus", max_seq_len=64, tokenizer=tokenizer, val_fraction=0.2))
    return root / "corpus"


def test_continue_training_on_other_data(tiny_recipe: Tiny, tmp_path: Path, first: Seen, other_corpus: Path) -> None:
    """All but weights and their averages is as in a run of its own; requeued, it goes on from itself."""
    data = f"train_loader.dataset.local={other_corpus}"
    changes = [*STEPS, data, "max_duration=4ba", "optimizer.lr=1e-3", "global_train_batch_size=4"]
    alone = run(tiny_recipe(tmp_path / "alone", *changes))
    phase = [*changes, load_path(first, 8), "load_weights_only=true", "autoresume=true"]
    recipe = tiny_recipe(tmp_path / "phase", *phase, "max_duration=2ba")
    began = run(recipe)
    assert "begun with the weights of " in began.err
    assert "note:" not in began.err
    resumed = run(tiny_recipe(tmp_path / "phase", *phase))
    assert "resumed from " in resumed.err
    assert began.samples + resumed.samples == alone.samples, "from the beginning of the data"
    assert list(resumed.column("lr").values()) == list(alone.column("lr").values()) == [5e-4, 1e-3, 1e-3, 1e-3]
    assert resumed.metrics[0]["loss/train/lm"] < alone.metrics[0]["loss/train/lm"] - 0.5, "the weights were there"

    weights, average = stored(first, 8), stored(first, 8, f"ema/{PARAMETER}")
    moved = (stored(began, 2) - weights).abs().max()
    assert 0 < moved < 3e-3, "two steps of AdamW that begins anew"
    expected = DECAY**2 * average + DECAY * (1 - DECAY) * weights + (1 - DECAY) * weights
    torch.testing.assert_close(stored(began, 2, f"ema/{PARAMETER}"), expected, rtol=0, atol=3e-3)
    assert (average - weights).abs().max() > 1e-2, "the comparison above can fail"
    assert stored(began, 2, STEP) == 2


def test_anneal(tiny_recipe: Tiny, tmp_path: Path, first: Seen) -> None:
    """The warm-up ends where the checkpoint is, so that the rate falls from its peak to 0, on the data that follow."""
    schedule = "scheduler={name: linear_decay_with_warmup, t_warmup: 4ba, alpha_f: 0.0}"
    annealed = run(tiny_recipe(tmp_path, *STEPS, load_path(first, 4), schedule))
    assert annealed.samples == first.samples[4:]
    assert annealed.column("lr") == pytest.approx({5: 0.0075, 6: 0.005, 7: 0.0025, 8: 0.0})
    assert (
        "note: the learning rate of batch 5 is 0.0075, by this recipe's schedule; scheduler.name is "
        "'linear_decay_with_warmup', and was 'constant_with_warmup'; scheduler.t_warmup is '4ba', and was '2ba'; "
        "scheduler.alpha_f is 0.0, and was null; the batch before had 0.01\n"
    ) in annealed.err
    assert stored(annealed, 8, STEP) == 8, "the optimizer goes on"
    assert annealed.metrics[0]["loss/train/lm"] == first.column("loss/train/lm")[5]


def test_fork_a_run(tiny_recipe: Tiny, tmp_path: Path, first: Seen) -> None:
    """The same run but for what is changed: here the rate, from the first batch on, and how long it is."""
    fork = run(tiny_recipe(tmp_path, *STEPS, load_path(first, 6), "optimizer.lr=1e-5", "max_duration=10ba"))
    assert fork.samples[:2] == first.samples[6:]
    assert fork.column("lr") == dict.fromkeys(range(7, 11), 1e-5)
    assert fork.metrics[0]["loss/train/lm"] == first.column("loss/train/lm")[7], "before its first step"
    moved = [(stored(run, 8) - stored(first, 6)).abs().max() for run in (fork, first)]
    assert moved[0] < 3e-5 < 1e-3 < moved[1]


@pytest.mark.slow
def test_extending_a_run_says_what_becomes_of_the_rate(tiny_recipe: Tiny, tmp_path: Path) -> None:
    cosine = ("scheduler={name: cosine_with_warmup, t_warmup: 1ba, alpha_f: 0.1}", "autoresume=true")
    ended = run(tiny_recipe(tmp_path, *cosine, "max_duration=3ba", "eval_interval=2ba"))
    assert ended.column("lr")[3] == pytest.approx(1e-3)
    longer = run(tiny_recipe(tmp_path, *cosine, "max_duration=5ba", "eval_interval=2ba"))
    rate = longer.column("lr")[4]
    said = (
        f"note: the learning rate of batch 4 is {rate:.4g}, by this recipe's schedule; max_duration is '5ba', and was"
    )
    assert f"{said} '3ba'; the batch before had 0.001\n" in longer.err
    assert rate > 2e-3
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["batch"] for line in lines] == [1, 2, 3, 4, 5], (
        "one line a batch, with the last evaluation"
    )
    assert list(longer.column("metrics/eval/LanguageCrossEntropy")) == [2, 3, 4, 5]


def test_data_of_the_same_content_may_lie_anywhere(
    tiny_recipe: Tiny, tiny_corpus: Path, tmp_path: Path, first: Seen
) -> None:
    """A run_dir that was copied, under another name, with data that come through a cache from a copy."""
    shutil.copytree(first.run_dir, tmp_path / "run")
    for batch in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"ba{batch}")
    shutil.copytree(tiny_corpus, tmp_path / "copy")
    places = [
        f"train_loader.dataset.local={tmp_path}/cache",
        f"train_loader.dataset.remote={tmp_path}/copy",
        f"eval_loader.dataset.local={tmp_path}/copy",
        f"tokenizer.name={tmp_path}/copy/tokenizer",
    ]
    recipe = tiny_recipe(tmp_path / "copy" / ".." / "run", *STEPS, *places, "autoresume=true", "run_name=moved")
    went_on = run(recipe)
    assert went_on.exact() == first.exact()
    assert went_on.samples == first.samples[4:]
    superseded = (tmp_path / "run" / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["batch"] for line in superseded] == [5, 6, 7, 8]


def test_data_that_were_replaced_under_their_path_are_refused(
    tiny_recipe: Tiny, tiny_corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_corpus, tmp_path / "data"))
    keys = [f"train_loader.dataset.local={data}", "autoresume=true", "max_duration=2ba"]
    run(tiny_recipe(tmp_path / "run", *keys))
    shutil.rmtree(data)
    shutil.copytree(other_corpus, data)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=rf"train_loader\.dataset: {data}/train is not what .*/ba2 was saved with"):
        run(tiny_recipe(tmp_path / "run", *keys, "max_duration=4ba"))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_checkpoint_of_an_earlier_release_goes_on(tiny_recipe: Tiny, tmp_path: Path, first: Seen) -> None:
    """Without digests, with what Composer's scheduler had; with Composer's timing its rates are the same."""
    old = Path(shutil.copytree(first.run_dir / "checkpoints" / "ba4", tmp_path / "old"))
    state = json.loads((old / "state.json").read_text())
    del state["data_digests"], state["lr"]
    for key in ("format_version", "scheduler.timing", "load_weights_only"):
        del state["recipe"][key]
    state["schedulers"] = [{"last_epoch": 4, "_last_lr": [0.01, 0.01]}]
    (old / "state.json").write_text(json.dumps(state))
    recommit(old)
    went_on = run(tiny_recipe(tmp_path / "run", *STEPS, f"load_path={old}"))
    assert went_on.exact() == first.exact(5)
    assert "scheduler.timing is 'batch_end', and was 'composer'" in went_on.err


def test_a_run_that_has_saved_nothing_leaves_no_lines_to_the_next(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "max_duration=2ba")
    whole = run_recipe(recipe)
    shutil.rmtree(tmp_path / "checkpoints")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 3, "lr": 7.0}\n{"batch": 4, "l')
    again = run_recipe(recipe)
    assert again.exact() == whole.exact()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "metrics.superseded.jsonl").read_text().splitlines()) == 4
