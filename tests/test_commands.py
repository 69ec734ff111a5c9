"""Every command of README.md and docs/ is executed, or has its reason here.

The slow tests execute a page from top to bottom in a directory with what its reader has: texts, runs, recipes, all
tiny. Words are changed only as :data:`CHANGED` and :data:`ADDED` say, so that a command ends in seconds; its ranks are
forked, as many as it asks for.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY
from tests.distributed import captured_output, run_distributed
from tests.evaluation.tiny_tasks import problems, write_lines, write_tasks
from tests.llm_foundry import recipes
from tests.migration.recipes import exact_mpt
from tests.test_documentation import PAGES, ROOT

ELSEWHERE = (
    # page, first words of a command (all of the page, if none), why it is not executed here
    ("CONTRIBUTING.md", "", "tests/project/test_makefile.py has the targets; pre-commit needs a network"),
    ("", "make", "tests/project/test_makefile.py has the targets"),
    ("tutorial.md", "", "tests/test_tutorial.py executes the page"),
    ("llm_foundry.md", "", "tests/llm_foundry/test_training.py has these commands, on one rank and on two"),
    ("conversion.md", "", "tests/conversion/test_documented_conversions.py executes the page"),
    ("README.md", "moefoundry convert", "tests/conversion/test_documented_conversions.py executes it"),
    ("finetuning.md", "", "tests/train/test_finetuning.py executes the steps, with the tiny recipes"),
    ("lora.md", "", "tests/conversion/test_adapters.py has these conversions"),
    ("sweeps.md", "", "nine long runs; tests/sweeping/test_sweep.py and the tutorial have short ones"),
    ("trackers.md", "", "needs accounts; tests/train/test_trackers.py has each tracker without its server"),
    ("training.md", "moefoundry replay", "tests/train/test_nonfinite.py repeats a step that was saved"),
    ("training.md", "composer -n 8 -m moefoundry replay", "tests/train/test_nonfinite.py repeats it on two ranks"),
    ("", "moefoundry verify", "minutes each; tests/verify/test_checks.py has every check"),
    ("balance.md", "python -m benchmarks.balance", "half an hour"),
    ("fp8.md", "python -m benchmarks.fp8_study", "30 runs of two minutes"),
    ("megablocks.md", "moefoundry train", "needs a GPU; tests/moe/test_megablocks_backend.py has the CPU's share"),
    ("megablocks.md", "TORCH_CUDA_ARCH_LIST=9.0", "needs a network"),
    ("performance.md", "MOEFOUNDRY_QUACK", "needs the package; tests/ops/quack_experts says what it does"),
    ("", "pip install", "needs a network"),
    ("evaluation.md", "moefoundry eval runs/mine --harness", "tests/evaluation/test_harness.py, without downloads"),
    ("generation.md", "moefoundry generate runs/mine --prefix", "tests/cli/test_generate.py, with special tokens"),
    ("", "composer -n 8 scripts/train.py configs/pretrain", "needs 8 GPUs"),
    ("README.md", "composer -n 8 scripts/train.py ckpt/qwen3", "needs 8 GPUs and the published weights"),
    ("README.md", "moefoundry prepare my_texts/ data/qwen3", "needs the published tokenizer"),
    ("", "srun", "needs Slurm: tests/launching/test_real_slurm.py"),
    ("", "torchrun --nnodes 8", "needs 8 nodes"),
    ("", "mpirun", "needs MPI: tests/cli/test_world.py has its variables"),
    ("launching.md", "squeue", "needs a cluster"),
    ("launching.md", "sky", "needs a cluster"),
    ("launching.md", "kubectl", "needs a cluster"),
    ("launching.md", "ray", "needs a cluster"),
    ("training.md", "eval", "tests/cli/test_command_line.py has the scripts of the shells"),
    ("training.md", "_MOEFOUNDRY_COMPLETE", "tests/cli/test_command_line.py has the scripts of the shells"),
)
SMALL = (
    *(each for each in TINY if each.startswith(("model", "max_seq_len", "global", "device_", "scheduler"))),
    *("model.moe.num_experts=8", "model.n_dense_layers=1", "precision.compute=fp32", "max_duration=2ba"),
    *("eval_interval=1000ba", "save_interval=1000ba", "model.attention.qk_norm=none", "model.vocab_size=32000"),
    *("train_loader.num_workers=0", "callbacks.report=null"),
)
"""Overrides that make a run of the large recipe that ``init`` writes end in seconds."""

CHANGED = {
    # page: what is written, and what stands for it
    "checkpoints.md": {"400": "2", "ba400": "ba2"},
    "generation.md": {"ba200": "ba2"},
    "evaluation.md": {"200": "2"},
    "watching.md": {"/scratch/runs": "runs"},
    "training.md": {"ba8000": "ba2", "8000ba": "2ba", "10000ba": "6ba", "12000ba": "6ba", "1000ba": "6ba"},
}
ADDED = (
    # page, first words, what is added
    ("README.md", "moefoundry validate mine.yaml", SMALL),
    ("README.md", "composer -n 8 scripts/train.py mine.yaml", SMALL),
    ("README.md", "composer -n 8 scripts/train.py runs/mine/config.yaml", ("max_duration=3ba",)),
    ("README.md", "moefoundry launch mine.yaml", (*SMALL, "global_train_batch_size=64")),
    ("families.md", "python scripts/train.py", ("max_duration=2ba",)),
    ("evaluation.md", "moefoundry eval runs/mine --humaneval", ("--max-new-tokens", "4")),
    ("howto.md", "python scripts/train.py", ("save_remote=s3://bucket/runs/${run_name}", "max_duration=6ba")),
    ("launching.md", "moefoundry launch", ("--dry-run", "global_train_batch_size=64")),
    ("launching.md", "moefoundry launch recipe.yaml --on k8s", ("launch.mounts=[claim:/data]", "run_dir=/data/mine")),
    (
        "launching.md",
        "moefoundry launch recipe.yaml --on skypilot",
        ("launch.mounts=[s3://b:/data]", "run_dir=/data/m"),
    ),
    ("training.md", "moefoundry validate --show wide.yaml", ("max_seq_len=64", "global_train_batch_size=8")),
    ("training.md", "python scripts/train.py", ("run_name=alone",)),  # torchrun's has trained it already
    ("training.md", "composer -n 8 scripts/train.py recipe.yaml device_train_microbatch_size", ("run_name=sized",)),
)
STATUSES = {"doctor": {0, 1}}  # of a machine that it finds something wrong with


def page_commands(page: Path) -> Iterator[str]:
    """Command lines of a page, in order; a block with a document of its own is one."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if "<<" in block:
            yield block
        else:
            lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
            yield from (line for line in lines if line and not re.search(r" \[[-A-Z]", line))  # no synopsis


def first_words(line: str) -> str:
    return " ".join(shlex.split(line, comments=True))


def reason(page: str, line: str) -> tuple[str, str, str] | None:
    """The entry that says why a command is not executed here."""
    words = first_words(line) if "<<" not in line else line
    return next((each for each in ELSEWHERE if each[0] in ("", page) and words.startswith(each[1])), None)


def executed(page: Path) -> list[str]:
    return [line for line in page_commands(page) if reason(page.name, line) is None]


def as_ranks(words: list[str]) -> tuple[int, list[str]]:
    """Number of ranks of a command, and the arguments of ``moefoundry`` in each."""
    match words:
        case ["moefoundry", *arguments]:
            return 1, arguments
        case ["python", "scripts/train.py", *arguments]:
            return 1, ["train", *arguments]
        case ["composer", "-n", ranks, "scripts/train.py", *arguments]:
            return int(ranks), ["train", *arguments]
        case ["torchrun", "--nproc-per-node", ranks, "scripts/train.py", *arguments]:
            return int(ranks), ["train", *arguments]
        case ["torchrun", "--nproc-per-node", ranks, "-m", "moefoundry", *arguments]:
            return int(ranks), arguments
    raise AssertionError(f"{words}: neither executed nor in ELSEWHERE")


def test_every_command_is_executed_or_has_its_reason() -> None:
    used = set()
    for page in PAGES:
        for line in page_commands(page):
            if why := reason(page.name, line):
                used.add(why)
            elif "<<" not in line and not line.startswith("python -c"):
                as_ranks(shlex.split(line, comments=True))
    assert set(ELSEWHERE) == used, "an entry without a command"
    for _, _, why in ELSEWHERE:
        for name in re.findall(r"tests/\S+\.py", why):
            assert (ROOT / name).exists(), name


def run_command(arguments: list[str], directory: Path, variables: dict[str, str]) -> tuple[int, str, str]:
    from moefoundry.cli.main import main

    os.chdir(directory)
    os.environ.update(variables)
    sys.argv = ["moefoundry", *arguments]
    with captured_output() as texts:
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, *texts


@pytest.fixture(scope="module")
def scene(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What readers have."""
    root = tmp_path_factory.mktemp("scene")
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mine", "corpus", "other"):
        shutil.copytree(tiny_corpus, root / "data" / name)
    shutil.copytree(tiny_corpus / "tokenizer", root / "imported/tokenizer")
    for name in ("my_texts", "text"):
        (root / name).mkdir()
        lines = [f"{number} words in a line of text, {number * 7919 % 1000}\n" for number in range(6000)]
        for part in range(60):
            (root / name / f"{part}.txt").write_text("".join(lines[part::60]))
    recipe: dict[str, object] = {}
    for override in (*TINY, "train_loader.dataset.local=data/mine", "model.moe.num_experts=8", "save_interval=2ba"):
        key, value = override.split("=", 1)
        *above, last = key.split(".")
        place = recipe
        for part in above:
            place = place.setdefault(part, {})  # type: ignore[assignment]
        place[last] = yaml.safe_load(value)
    recipe["ema"] = {"decay": 0.5}
    recipe["launch"] = {"image": "moefoundry:1", "gpu_type": "H100", "workdir": "/srv/moefoundry"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for run in ("mine", "base", "wide"):
        succeed(["train", "recipe.yaml", f"run_name={run}", f"run_dir=runs/{run}"], 1, root)
    shutil.copytree(root / "runs/mine/checkpoints/ba2", root / "runs/mine/checkpoints/ba2.quarantine-0")
    tasks = yaml.safe_load(write_tasks(root).read_text())
    (root / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks["icl_tasks"][:2]}))
    (root / "gauntlet.yaml").write_text(yaml.safe_dump({"eval_gauntlet": tasks["eval_gauntlet"]}))
    write_lines(root / "human_eval.jsonl", problems())
    succeed(["convert", "export", "runs/mine", "-o", "hf/model"], 1, root)
    recipes.write(root, recipes.recipe(exact_mpt(), tiny_corpus), "llm_foundry.yaml")
    shutil.copytree(root / "hf/model", root / "Qwen3-30B-A3B")
    return root


def succeed(arguments: list[str], ranks: int, directory: Path, variables: dict[str, str] | None = None) -> None:
    outcomes = run_distributed(run_command, ranks, arguments, directory, variables or {}, timeout=500)
    allowed = STATUSES.get(arguments[0], {0})
    for status, out, err in outcomes:
        assert status in allowed, f"moefoundry {shlex.join(arguments)}\n{out[-2000:]}\n{err[-4000:]}"


def in_this_place(page: str, words: list[str], number: int) -> list[str]:
    """The words of a command as they are executed."""
    for written, meant in CHANGED.get(page, {}).items():
        words = [re.sub(rf"(?<![\w.]){re.escape(written)}(?!\w)", meant, word) for word in words]
    if words[:2] == ["moefoundry", "init"] and page == "training.md":
        words = [f"recipe{number}.yaml" if word == "recipe.yaml" else word for word in words]  # none is replaced
    line = " ".join(words)
    added = [more for of, first, more in ADDED if of == page and line.startswith(first)]
    return [*words, *(word for more in added for word in more)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if executed(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, scene: Path, tmp_path: Path, s3: dict[str, str]) -> None:
    place = tmp_path / "place"
    shutil.copytree(scene, place)
    for name, text in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        (place / name).write_text(text)
    if page.name == "README.md":  # its commands make the run
        shutil.rmtree(place / "runs/mine")
    for number, line in enumerate(executed(page)):
        if "<<" in line or line.startswith("python -c"):
            run_script(line, place)
            continue
        ranks, arguments = as_ranks(in_this_place(page.name, shlex.split(line, comments=True), number))
        if arguments[0] == "prepare" and arguments[1] != "merge" and "--part" not in arguments:  # one of several ways
            shutil.rmtree(place / arguments[2], ignore_errors=True)
        succeed(arguments, ranks, place, s3)


def run_script(text: str, directory: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", text]
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
