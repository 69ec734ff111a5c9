"""``moefoundry plan``: its table, its JSON, the page that shows one, and what it says about bad input."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moefoundry.cli.main import main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL = [QUICKSTART, "mesh.shard=4", "mesh.expert=2", "mesh.replicate=2", "global_train_batch_size=16"]


def test_table(capsys):
    assert main(["plan", *SMALL, "--world-size", "8", "--gpus-per-node", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "quickstart: 20.80M parameters, 7.04M active\n8 ranks, 4 a node: replicate 2 x shard 4, expert"
    )
    assert "fits 80 GB (74.506 GiB)" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["parameters", "(fp32)", "0.019", "exact"] in rows
    assert ["all-reduce", "replicate", "2", "13", "0.019", "0.019"] in rows
    assert ["all-to-all", "expert", "2", "35", "0.015", "-"] in rows


def test_json_has_bytes_and_adds_up(capsys):
    assert main(["plan", *SMALL, "--world-size", "8", "--json", "--memory-gb", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory = plan["memory"]
    sizes = {"replicate": 2, "shard": 4, "expert": 2, "expert_nodes": 1, "world_size": 8}
    assert plan["mesh"] == {**sizes, "gather": "each_pass", "reduce": "each_micro_batch"}
    held = sum(memory[name] for name in ("parameters", "gradients", "optimizer"))
    assert memory["total"] == held + memory["peak"]["total"]
    assert memory["limit"] == 10**9
    assert memory["fits"]
    assert {(entry["collective"], entry["axis"]) for entry in plan["traffic"]} == {
        ("all_gather", "shard"),
        ("reduce_scatter", "shard"),
        ("all_reduce", "replicate"),
        ("all_gather", "expert_shard"),
        ("reduce_scatter", "expert_shard"),
        ("all_to_all", "expert"),
    }


def test_what_does_not_fit_is_said(capsys):
    arguments = [QUICKSTART, "global_train_batch_size=4", "--memory-gb", "1", "model.d_model=4096"]
    assert main(["plan", "--world-size", "1", *arguments]) == 0
    out = capsys.readouterr().out
    assert "does not fit 1 GB" in out
    assert "\none rank: nothing is sent\nexport: qwen2_moe, which computes the same with " in out


@pytest.mark.parametrize(("memory", "fits"), [("1", False), ("80", True)])
def test_what_does_not_fit_is_a_field_and_on_request_a_status(memory: str, fits: bool, capsys) -> None:
    arguments = ["plan", QUICKSTART, "--world-size", "1", "--json", "--memory-gb", memory]
    arguments += ["model.d_model=1024", "max_seq_len=4096"]
    assert main([*arguments, "--exit-code"]) == (0 if fits else 1)
    assert json.loads(capsys.readouterr().out)["memory"]["fits"] == fits


def test_a_recipe_for_more_ranks_comes_with_degrees_that_fit(capsys):
    recipe = str(ROOT / "configs" / "pretrain" / "deepseek-v3-671b.yaml")
    assert main(["plan", recipe, "--world-size", "8"]) == 2
    *_, advice = capsys.readouterr().err.splitlines()
    assert advice == "  a world size of 8 fits with: mesh.replicate=1 mesh.shard=8 mesh.expert=8"
    assert main(["validate", recipe, "--world-size", "8", *advice.split(": ")[1].split()]) == 0


def test_the_page_shows_what_the_command_prints(capsys):
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    command = shlex.split(page.split("```bash\n")[1].split(" [--")[0])
    shown = page.split("```\n\n")[1].split("```\n")[1]
    assert main([str(ROOT / word) if word.endswith(".yaml") else word for word in command[1:]]) == 0
    assert shown == capsys.readouterr().out, f"paste the output of {' '.join(command)} into docs/plan.md"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["mesh.shard=3", "--world-size", "8"], "mesh.shard"),
        (["mesh.expert=3", "--world-size", "8"], "mesh.expert"),
        (["--world-size", "3"], "global_train_batch_size"),
        (["mesh.expert=-1", "--world-size", "4"], "mesh.expert"),
        (["model.d_model=0", "--world-size", "4"], "model.d_model"),
        (["configs/none.yaml", "--world-size", "4"], "configs/none.yaml"),
    ],
)
def test_bad_recipes_exit_2_and_name_the_key(arguments, key, capsys):
    recipe = [] if arguments[0].endswith(".yaml") else [QUICKSTART]
    assert main(["plan", *recipe, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"\n  {key}: " in captured.err


@pytest.mark.parametrize("option", ["--world-size", "--gpus-per-node", "--memory-gb"])
@pytest.mark.parametrize("value", ["0", "-8", "many"])
def test_bad_options_exit_2_and_are_named(option, value, capsys):
    assert main(["plan", "--world-size", "4", f"{option}={value}"]) == 2
    assert f"error: {option}: '{value}' is not a positive integer" in capsys.readouterr().err


def test_a_bad_recipe_is_refused_before_torch_is_imported():
    script = (
        "import sys\n"
        "from moefoundry.cli.main import main\n"
        "assert main(['plan', '--world-size', '4', 'model.d_model=0']) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=True)


def test_plans_import_nothing_heavy():
    script = (
        "import sys\n"
        "from moefoundry.cli.main import main\n"
        f"words = [{QUICKSTART!r}, '--world-size', '4']\n"
        "assert [main([name, *words]) for name in ('plan', 'estimate', 'recommend')] == [0, 0, 0]\n"
        "print(sorted({'torch', 'numpy', 'composer', 'moefoundry.model.transformer'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
