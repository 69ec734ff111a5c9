"""What several test packages share: a tiny corpus, recipes for it, and the ranks' server started in time."""

import faulthandler
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moefoundry.config import Recipe, load_recipe
from tests.made_once import made_once

if TYPE_CHECKING:
    from tests.evaluation.tiny_tasks import Trained

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads than free cores wait for each other, busily

GPU_SECONDS = 75.0
"""A test on a GPU takes no longer, and most of that to compile its kernels."""
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
QUICK = (
    "run_name=quickstart",
    "max_seq_len=512",
    "model={vocab_size: 4096, d_model: 256, n_layers: 6, n_dense_layers: 1, ffn_hidden_size: 1024, init: {std: 0.06}}",
    "model.attention={n_heads: 8, n_kv_heads: 4}",
    "model.moe={num_experts: 16, top_k: 2, expert_hidden_size: 256, num_shared_experts: 1}",
    "train_loader.dataset.local=data/quickstart",
    "optimizer.lr=4e-3",
    "scheduler.t_warmup=0.3dur",
    "max_duration=200ba",
    "global_train_batch_size=4",
)
"""Every required key of a recipe, as overrides, with the quickstart's values."""

TINY = (
    "run_name=tiny",
    "max_seq_len=64",
    "model.vocab_size=384",
    "model.d_model=32",
    "model.n_layers=3",
    "model.n_dense_layers=1",
    "model.ffn_hidden_size=64",
    "model.init.std=0.02",
    "model.attention={n_heads: 4, n_kv_heads: 2}",
    "model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 32, num_shared_experts: 1}",
    "optimizer.lr=1e-2",
    "scheduler.t_warmup=2ba",
    "callbacks.report=null",
    "max_duration=4ba",
    "eval_interval=1000ba",
    "global_train_batch_size=8",
    "device_train_microbatch_size=2",
    "device_eval_batch_size=4",
    "save_interval=1000ba",
)


def pytest_collection_finish(session: pytest.Session) -> None:
    """The server's imports run beside the tests that need no ranks; what is imported here is no garbage.

    Tests of a GPU have no ranks, so that where they run alone there is no server.
    """
    gc.freeze()
    for_cpu = any(item.get_closest_marker("gpu") is None for item in session.items)
    if for_cpu and not session.config.option.collectonly and "tests.distributed" in sys.modules:
        sys.modules["tests.distributed"].start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def sound_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """End this worker of pytest-xdist, which starts another, where a test hangs on a GPU or leaves it unusable."""
    if request.node.get_closest_marker("gpu") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    import torch

    faulthandler.dump_traceback_later(GPU_SECONDS, exit=True)
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # every later test of this process would fail with the same error
        os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def kept_between_runs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``kept_between_runs(name)``: a directory that the next run of the tests finds again, until ``make clean``."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp if cache is None else cache.mkdir


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of Python-like text: vocabulary 384, samples of 64 tokens, about 50 of them for training, so
    that an epoch of global batches of 8 sequences has 6 batches."""
    from moefoundry.data.options import PrepareOptions
    from moefoundry.data.prepare import prepare

    root = tmp_path_factory.mktemp("tiny")
    words = random.Random(0)
    for number in range(52):
        lines = [
            f"def {name}_{number}(value):\n    return value {words.choice('+-*')} {words.randrange(1000)}\n"
            for name in words.sample(["first", "second", "third", "last", "inner", "outer", "left", "right"], 6)
        ]
        (root / f"module{number:02d}.py").write_text("\n".join(lines))
    prepare(PrepareOptions(str(root), root / "corpus", max_seq_len=64, vocab_size=384, val_fraction=0.2))
    return root / "corpus"


@pytest.fixture(scope="session")
def tiny_overrides(tiny_corpus: Path) -> Callable[..., list[str]]:
    """``tiny_overrides(run_dir, "key=value", ...)``: a tiny recipe as overrides."""

    def overrides(run_dir: Path, *changes: str) -> list[str]:
        return [*TINY, f"train_loader.dataset.local={tiny_corpus}", f"run_dir={run_dir}", *changes]

    return overrides


@pytest.fixture(scope="session")
def tiny_recipe(tiny_overrides: Callable[..., list[str]]) -> Callable[..., Recipe]:
    """``tiny_recipe(run_dir, "key=value", ...)``: that recipe."""
    return lambda run_dir, *changes: load_recipe(None, tiny_overrides(run_dir, *changes))


@pytest.fixture(scope="session")
def trained(tiny_overrides: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """A tiny model that has learned a little: its run with tasks, and what it exports."""
    from tests.evaluation.tiny_tasks import train_and_export

    return made_once(tmp_path_factory, "trained", lambda root: train_and_export(tiny_overrides, root))


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """Environment in which Composer's client finds a server with an empty bucket, ``s3://bucket``."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    names = ("aws_access_key_id", "aws_secret_access_key", "region_name")
    client = boto3.client("s3", endpoint_url=endpoint, **dict(zip(names, keys.values(), strict=True)))
    client.create_bucket(Bucket="bucket")
    yield {**keys, "S3_ENDPOINT_URL": endpoint}
    server.stop()
