"""Training on two streams of documents with fill-in-the-middle: exact resumption, and counts that follow the run."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.config import Recipe, UserError, flatten
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout
from tests.distributed import RankError
from tests.train.runs import Run, run_recipe
from tests.train.test_resume import kill_in_batch_9

Tiny = Callable[..., Recipe]
HELD_OUT = "metrics/eval/LanguageCrossEntropy"
TOKENS = ("tokens/code", "tokens/text")


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora ``code`` and ``text`` of one tokenizer; an epoch of both has 5 or so batches of 8 rows of 64 tokens."""
    root = tmp_path_factory.mktemp("streams")
    for name in ("code", "text"):
        (root / "in" / name).mkdir(parents=True)
    for number in range(60):
        (root / "in" / "code" / f"{number}.py").write_text(f"def f{number}(a):\n    return a + {number}\n" * 2)
        (root / "in" / "text" / f"{number}.txt").write_text(
            f"It is said that {number} is a number.\n" * (number % 4 + 1)
        )
    code = PrepareOptions(
        str(root / "in" / "code"), root / "code", vocab_size=384, val_fraction=0.2, layout=Layout.documents
    )
    prepare(code)
    source, tokenizer = str(root / "in" / "text"), root / "code" / "tokenizer"
    prepare(replace(code, source=source, out=root / "text", tokenizer=tokenizer))
    return root


@pytest.fixture(scope="module")
def recipe(streams: Path, tiny_recipe: Tiny) -> Tiny:
    """``recipe(run_dir, "key=value", ...)``: trains on both streams, and evaluates on both."""
    weights = f"code: {{local: {streams}/code, proportion: 0.7}}, text: {{local: {streams}/text, proportion: 0.3}}"
    held_out = f"code: {{local: {streams}/code}}, text: {{local: {streams}/text}}"
    keys = (
        f"train_loader.dataset.streams={{{weights}}}",
        "train_loader.dataset.fim={rate: 0.5, format: mixed, split: characters}",
        "train_loader.dataset.packing.method=best_fit",
        f"eval_loader.dataset.streams={{{held_out}}}",
        f"tokenizer.name={streams}/code/tokenizer",
        "model.document_masking=true",
        *("max_duration=12ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1", "eval_interval=6ba"),
    )
    return lambda run_dir, *changes: tiny_recipe(run_dir, *keys, *changes)


@pytest.fixture(scope="module")
def whole(recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(recipe(tmp_path_factory.mktemp("whole")), 2)


def checkpoint(run: Run, batch: int) -> str:
    return f"load_path={run.run_dir / 'checkpoints' / f'ba{batch}'}"


@pytest.fixture(scope="module")
def alone(recipe: Tiny, whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That run from the middle of its first epoch on, by one rank with a loader process."""
    changes = ("device_train_microbatch_size=8", "train_loader.num_workers=1", checkpoint(whole, 4))
    return run_recipe(recipe(tmp_path_factory.mktemp("alone"), *changes), 1)


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_never_stopped(recipe: Tiny, tmp_path: Path, whole: Run) -> None:
    """In the middle of the second epoch, to every digit, losses and tokens of each source."""
    resumed = run_recipe(recipe(tmp_path, checkpoint(whole, 8)), 2)
    assert resumed.exact() == whole.exact(9)
    for key in TOKENS:
        assert resumed.column(key) == {batch: count for batch, count in whole.column(key).items() if batch > 8}


def kill_a_loader_process_in_batch_9() -> None:
    """Of the last rank, as the kernel does when memory runs out."""
    from composer.core import Callback, State
    from composer.loggers import Logger
    from composer.utils import dist

    from moefoundry import build as parts

    class Killer(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == 8 and dist.get_global_rank() == dist.get_world_size() - 1:
                os.kill(state.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Killer()]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "of_loader"), [(0, False), (1, False), (2, False), (1, True), (2, True)])
def test_row1_killed_in_mid_epoch(recipe: Tiny, tmp_path: Path, whole: Run, workers: int, of_loader: bool) -> None:
    """A rank, or a loader process of one; the run goes on by itself, to every digit and token."""
    options = (f"train_loader.num_workers={workers}", "autoresume=true", "save_async=false")
    killed = recipe(tmp_path, *options)
    error, message = (UserError, "^loader process .* was killed") if of_loader else (RankError, "exit status -9")
    with pytest.raises(error, match=message):
        run_recipe(killed, 2, kill_a_loader_process_in_batch_9 if of_loader else kill_in_batch_9)
    resumed = run_recipe(killed, 2)
    assert resumed.exact() == whole.exact()
    for key in (*TOKENS, "data/padding"):
        assert resumed.column(key) == whole.column(key)


def test_tokens_of_sources_do_not_depend_on_the_mesh(whole: Run, alone: Run) -> None:
    for key in TOKENS:
        counts = whole.column(key)
        assert alone.column(key) == {batch: count for batch, count in counts.items() if batch > 4}
        assert sorted(counts.values()) == list(counts.values())
    padding = whole.column("data/padding")
    tokens = sum(whole.column(key)[12] for key in TOKENS)
    assert tokens == pytest.approx(sum((1 - share) * 8 * 64 for share in padding.values()))
    assert 0.5 < whole.column("tokens/code")[12] / tokens < 0.85
    assert all(0 < seconds < 60 for seconds in whole.column("data/wait_seconds").values())
    assert len(whole.column("data/wait_seconds")) == 12


def test_losses_by_source_add_up(whole: Run, alone: Run) -> None:
    """Of training and of held-out data; and on one rank they are those of two."""
    for name in ("code", "text"):
        for prefix in ("loss/train/source/", f"{HELD_OUT}/"):
            losses = alone.column(prefix + name)
            assert losses == pytest.approx({batch: whole.column(prefix + name)[batch] for batch in losses}, rel=1e-4)
    of_sources = [alone.column(f"loss/train/source/{name}") for name in ("code", "text")]
    whole_batch = alone.column("loss/train/lm")
    both = of_sources[0].keys() & of_sources[1].keys()
    assert both
    for batch in both:
        first, second = sorted(losses[batch] for losses in of_sources)
        assert first <= whole_batch[batch] <= second
    for batch in of_sources[0].keys() - both:
        assert of_sources[0][batch] == pytest.approx(whole_batch[batch], rel=1e-6)
    held_out = [alone.column(f"{HELD_OUT}{name}")[6] for name in ("/code", "", "/text")]
    assert sorted(held_out) in (held_out, held_out[::-1])
    assert held_out[0] != held_out[2]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("train_loader.dataset.packing.method=concat", "train_loader.dataset.packing.method: 'concat'"),
        ("train_loader.dataset.fim.rate=0.1", "train_loader.dataset.fim.rate: 0.1"),
        ("train_loader.dataset.fim=null", "train_loader.dataset.fim: null"),
        ("train_loader.dataset.streams.code.proportion=1", "train_loader.dataset.streams.code.proportion: 1.0"),
    ],
)
def test_a_run_does_not_go_on_with_other_rows(recipe: Tiny, tmp_path: Path, whole: Run, change: str, path: str) -> None:
    from moefoundry.checkpoint.run_dir import open_run
    from moefoundry.checkpoint.start import data_digests

    made = recipe(tmp_path / "run", checkpoint(whole, 8), change)
    with pytest.raises(UserError) as raised:
        open_run(made, data_digests(made))
    assert str(raised.value).startswith(f"{path}, and {whole.run_dir}/checkpoints/ba8 was written with ")
    assert "the rest of its epoch would be other samples" in str(raised.value)


def test_streams_may_lie_elsewhere_and_not_be_others(recipe: Tiny, tmp_path: Path, whole: Run, streams: Path) -> None:
    from moefoundry.checkpoint.run_dir import open_run
    from moefoundry.checkpoint.start import data_digests

    (tmp_path / "link").symlink_to(streams)
    training, held_out = "train_loader.dataset.streams", "eval_loader.dataset.streams"
    moved = recipe(tmp_path / "a", checkpoint(whole, 8), f"{training}.code.local={tmp_path}/link/code")
    digests = data_digests(moved)
    assert set(digests) == {
        *(f"{key}.{name}" for key in (training, held_out) for name in ("code", "text")),
        "tokenizer",
    }
    open_run(moved, digests)
    swapped = (f"{training}.code.local={streams}/text", f"{training}.text.local={streams}/code")
    other = recipe(tmp_path / "b", checkpoint(whole, 8), *swapped)
    with pytest.raises(UserError, match=rf"^{training}\.code: .*/text/train is not what .* was saved with"):
        open_run(other, data_digests(other))
    assert f"{training}.text.proportion" in flatten(other)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_evaluation_may_take_the_first_batches_alone(recipe: Tiny, tmp_path: Path, workers: int) -> None:
    """The same ones again and again, of both streams; with loader processes that are stopped before they are done."""
    steps = ("max_duration=2ba", "eval_interval=1ba", "optimizer.lr=1e-30", "device_eval_batch_size=2")
    some = run_recipe(recipe(tmp_path, *steps, "eval_subset_num_batches=2", f"eval_loader.num_workers={workers}"), 1)
    for source in ("", "/code", "/text"):
        losses = some.column(f"{HELD_OUT}{source}")
        assert losses[1] == pytest.approx(losses[2], abs=1e-6)
    every = run_recipe(recipe(tmp_path / "every", *steps, "max_duration=1ba", "scheduler.t_warmup=1ba"), 1)
    assert some.column(HELD_OUT)[1] != pytest.approx(every.column(HELD_OUT)[1], abs=1e-6)


def test_a_source_without_rows_has_no_held_out_loss(recipe: Tiny, tmp_path: Path) -> None:
    """One row is evaluated, which is of one source."""
    some = ("eval_subset_num_batches=1", "device_eval_batch_size=1", "max_duration=1ba", "eval_interval=1ba")
    run = run_recipe(recipe(tmp_path, *some, "scheduler.t_warmup=1ba"), 1)
    found = [key for key in run.metrics[0] if key.startswith(f"{HELD_OUT}/")]
    assert len(found) == 1
    assert run.column(found[0])[1] == pytest.approx(run.column(HELD_OUT)[1])
