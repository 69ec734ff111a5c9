"""The command itself: exit status, streams, and what it does not import."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moefoundry.cli.main import COMMANDS, main
from moefoundry.config import load_recipe
from tests.conftest import QUICK

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def moefoundry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moefoundry", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_ok_is_a_line_and_what_the_model_can_be_exported_as_another(capsys):
    assert main(["validate", QUICKSTART, "model.moe.top_k=4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "OK quickstart: moe_causal_lm, 6 layers (1 dense), d_model 256, 16 experts top-4 + 1 shared"
    )
    assert second.startswith("export: ")


def test_ok_names_the_precision_whatever_this_machine_can_run(capsys):
    assert (
        main(["validate", QUICKSTART, "precision.fp8={recipe: deepseek_v3, backend: triton, exclude: [layers.0]}"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[0].endswith(" of 4 x 512 tokens, fp32, fp8 deepseek_v3")


MOE = ("model.n_dense_layers=0", "model.moe.num_shared_experts=0")


@pytest.mark.parametrize(
    ("overrides", "export"),
    [
        (MOE, "mixtral"),
        ((*MOE, "model.attention.qk_norm=head", "model.n_dense_layers=2"), "qwen3_moe"),
        (("model.n_dense_layers=6",), "llama"),
        (("model.attention.kind=mla", "model.moe.router.score_function=sigmoid"), "deepseek_v3"),
        ((*MOE, "model.attention.bias=qkv"), "qwen2_moe"),
        (("model.moe.shared_expert_gate=true", "model.attention.bias=qkv"), "qwen2_moe"),
        (("model.moe.router.score_function=sigmoid", "model.attention.rotary_fraction=0.5"), "glm4_moe"),
        (
            (),
            "qwen2_moe, which computes the same with moe.shared_expert_gate that is always 1/2, of shared experts "
            "times 2 and attention.bias qkv, of zeros",
        ),
        (
            ("model.moe.router.num_groups=4", "model.moe.router.top_k_groups=2"),
            "no Hugging Face family: model.moe.router.score_function: softmax, and glm4_moe has sigmoid",
        ),
        (
            ("model.attention.kind=mla",),
            "no Hugging Face family: model.moe.router.score_function: softmax, and deepseek_v3 has sigmoid",
        ),
    ],
)
def test_what_the_model_can_be_exported_as(overrides, export, capsys):
    assert main(["validate", QUICKSTART, *overrides]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"export: {export}"


def test_data_that_are_not_there_are_a_note_with_the_command_that_makes_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", QUICKSTART, "train_loader.dataset.local=my data", "load_path=nowhere"]) == 0
    data, start = capsys.readouterr().err.splitlines()
    assert data.startswith(
        "note: train_loader.dataset.local: my data: no such directory (the recipe's dataset.local); "
    )
    assert "moefoundry prepare stdlib 'my data' --vocab-size 4096" in data
    assert start == "note: load_path: nowhere: no such directory"
    remote = [f"{loader}.dataset.remote=s3://bucket/data" for loader in ("train_loader", "eval_loader")]
    assert main(["validate", QUICKSTART, remote[0]]) == 0
    assert capsys.readouterr().err.startswith("note: eval_loader.dataset.local: data/quickstart: no such directory")
    assert main(["validate", QUICKSTART, *remote, "tokenizer.name=here"]) == 0
    assert capsys.readouterr().err == "note: tokenizer.name: here: no such directory\n"
    assert main(["validate", QUICKSTART, "train_loader.dataset.remote=a", remote[1], "callbacks.report=null"]) == 0
    assert capsys.readouterr().err == "note: train_loader.dataset.remote: a: no such directory\n"
    assert main(["validate", QUICKSTART, *remote, "callbacks.report=null"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("max_seq_len=128", "train_loader.dataset.max_seq_len: {corpus}: packed to max_seq_len 64, and the recipe's "),
        (
            "model.vocab_size=300",
            "model.vocab_size: {corpus}: its vocabulary of 384 exceeds the model's vocab_size 300",
        ),
        ("model.vocab_size=300", "tokenizer.name: {corpus}/tokenizer has a vocabulary of 384, which exceeds model."),
        ("train_loader.dataset.split=test", "train_loader.dataset.split: {corpus}: no split 'test'; it has train, val"),
        ("eval_loader.dataset.local=nowhere", "eval_loader.dataset.local: nowhere: no such directory (the recipe's "),
        ("eval_loader.dataset.local={corpus}/val", "eval_loader.dataset.local: {corpus}/val/corpus.json: No such file"),
        ("global_train_batch_size=80", "global_train_batch_size: {corpus}/train: 53 sample(s), fewer than one global "),
        (
            "eval_loader={drop_last: true}",
            "device_eval_batch_size: {corpus}/val: 20 sample(s), fewer than one global batch of 64",
        ),
        (
            "train_loader.dataset.validate_hash=md5",
            "train_loader.dataset.validate_hash: {corpus}/train/index.json: no md5",
        ),
        ("eval_loader.dataset.remote=nowhere", "eval_loader.dataset.remote: nowhere/val/index.json: no such file"),
        ("tokenizer.name=nowhere", "tokenizer.name: nowhere/tokenizer.json: no such file"),
        ("load_path=nowhere", "load_path: no complete checkpoint at nowhere"),
        ("load_path={corpus}", "load_path: no complete checkpoint at {corpus}"),
    ],
)
def test_data_that_are_there_have_to_fit(change, problem, tiny_corpus, tiny_overrides, tmp_path, capsys):
    def command(*changes: str) -> list[str]:
        always = ("callbacks.report={}", "device_eval_batch_size=64")
        return ["validate", *tiny_overrides(tmp_path, *always, *changes)]

    assert main(command()) == 0
    assert capsys.readouterr().err == ""
    assert main(command(change.replace("{corpus}", str(tiny_corpus)))) == 2
    assert problem.replace("{corpus}", str(tiny_corpus)) in capsys.readouterr().err


def test_remote_data_in_a_directory_have_to_fit_too(tiny_corpus, tiny_overrides, tmp_path, capsys):
    cache = [f"train_loader.dataset.local={tmp_path / 'cache'}", f"tokenizer.name={tiny_corpus}/tokenizer"]
    remote = [f"{loader}.dataset.remote={tiny_corpus.as_uri()}" for loader in ("train_loader", "eval_loader")]
    command = ["validate", *tiny_overrides(tmp_path), *cache, *remote]
    assert main(command) == 0
    for change, problem in [
        ("max_seq_len=128", f"train_loader.dataset.max_seq_len: {tiny_corpus}: packed to max_seq_len 64, and the "),
        ("model.vocab_size=300", f"model.vocab_size: {tiny_corpus}: its vocabulary of 384 exceeds the model's "),
        ("global_train_batch_size=80", f"global_train_batch_size: {tiny_corpus}/train: 53 sample(s), fewer than one "),
    ]:
        capsys.readouterr()
        assert main([*command, change]) == 2
        assert problem in capsys.readouterr().err
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "corpus.json").write_text("{")
    shutil.copytree(tiny_corpus / "train", tmp_path / "copy" / "train")
    assert main([*command, f"train_loader.dataset.remote={tmp_path}/copy"]) == 2
    assert f"train_loader.dataset.remote: {tmp_path}/copy/corpus.json: " in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_local_load_path_has_to_fit(tiny_corpus, tiny_recipe, tiny_overrides, tmp_path, capsys):
    from moefoundry.checkpoint.start import known_digests
    from tests.checkpoint.test_start import save

    begun = tiny_recipe(tmp_path / "begun")
    save(begun, data_digests=known_digests(begun))
    command = ["validate", *tiny_overrides(tmp_path / "fork", f"load_path={tmp_path}/begun")]
    copy = tmp_path / "copy"
    shutil.copytree(tiny_corpus, copy)
    index = copy / "train" / "index.json"
    index.write_text(index.read_text().replace('"samples": 53', '"samples": 52'))
    for change, problem in [
        ("max_duration=4ba", f"load_path: {tmp_path}/begun/checkpoints/ba4 is at batch 4 of max_duration=4ba"),
        ("global_train_batch_size=4", "global_train_batch_size: 4, and "),
        ("model.n_layers=2", "model.n_layers: 3 there, 2 here"),
        (f"train_loader.dataset.local={copy}", f"train_loader.dataset: {copy}/train is not what "),
    ]:
        assert main([*command, "max_duration=8ba", change]) == 2
        assert problem in capsys.readouterr().err
    assert main([*command, "max_duration=8ba"]) == 0
    assert main([*command, "load_weights_only=true"]) == 0
    save(tiny_recipe(tmp_path / "fork"))
    assert main([*command, "autoresume=true", "load_path=gone"]) == 0, "its own checkpoint comes first"


def test_damaged_data_and_prompts_of_no_tokens_are_found(tiny_corpus, tiny_overrides, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    copy = tmp_path / "copy"
    shutil.copytree(tiny_corpus, copy)
    overrides = [*tiny_overrides(tmp_path / "run"), f"train_loader.dataset.local={copy}"]
    shard = next((copy / "train").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (copy / "val" / "index.json").write_text("{")
    assert main(["validate", *overrides]) == 2
    error = capsys.readouterr().err
    assert f"train_loader.dataset.local: {shard}: truncated shard: " in error
    assert f"eval_loader.dataset.local: {copy}/val/index.json: cannot be read: " in error

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    vocabulary = {"word": 0, "<end>": 1}
    Tokenizer(models.WordLevel(vocabulary)).save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    overrides = [*tiny_overrides(tmp_path / "run"), f"tokenizer.name={tokenizer}"]
    assert main(["validate", *overrides, "callbacks.report.prompt=other"]) == 2
    assert f"callbacks.report.prompt: {tokenizer} makes no token of it" in capsys.readouterr().err
    assert main(["validate", *overrides, "callbacks.report.prompt=word"]) == 0


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_a_gate_that_cannot_learn_is_a_warning_with_the_cure(score_function, capsys):
    recipe = ["validate", QUICKSTART, "model.moe.top_k=1", f"model.moe.router.score_function={score_function}"]
    assert main(recipe) == 0
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith(
        "warning: model.moe.router.normalize_topk: true, and with model.moe.top_k=1 every weight "
    )
    cure = warning.split("did you mean '")[1].split("'")[0]
    for change in (cure, "model.moe.num_experts=1", "model.moe.router.assignment=uniform", "model.moe.top_k=2"):
        assert main([*recipe, change]) == 0
        assert "warning" not in capsys.readouterr().err


def test_names_of_modules_are_checked_against_the_model(capsys):
    assert main(["validate", QUICKSTART, "precision.fp8={recipe: rowwise, exclude: [layers.5, '*.experts']}"]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "validate",
                QUICKSTART,
                "--print",
                "precision.fp8={recipe: rowwise, exclude: [layers.6, lm_head, layer.1]}",
            ]
        )
        == 2
    )
    assert capsys.readouterr() == (
        "",
        f"error: {QUICKSTART}: 2 errors\n"
        "  precision.fp8.exclude: no module is named 'layers.6'; did you mean 'layers.5'?\n"
        "  precision.fp8.exclude: no module is named 'layer.1'; did you mean 'layers.1'?\n",
    )


def test_targets_of_adapters_are_checked_against_the_model(capsys):
    recipe = ["validate", QUICKSTART, "load_path=none", "precision.compute=fp32"]
    assert main([*recipe, "lora.targets=[attention.q_proj, experts]"]) == 0
    capsys.readouterr()
    assert main([*recipe, "lora.targets=[attention.q_prog, experts]"]) == 2
    (problem,) = [line for line in capsys.readouterr().err.splitlines() if "lora.targets" in line]
    assert problem.endswith("lora.targets[0]: the model has no attention.q_prog; did you mean 'attention.q_proj'?")


def test_overrides_alone_are_a_recipe_if_nothing_is_missing(capsys):
    assert main(["validate", *QUICK, "run_name=other"]) == 0
    assert "OK other" in capsys.readouterr().out
    assert main(["validate", *QUICK[1:]]) == 2
    assert "  run_name: missing: name of the run; customary: " in capsys.readouterr().err


def test_print_is_a_recipe_that_loads(capsys, tmp_path):
    assert main(["validate", QUICKSTART, "--print", "seed=3"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(path) == load_recipe(QUICKSTART, ["seed=3"])


def test_show_is_that_recipe_with_where_each_value_comes_from(capsys, tmp_path):
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text(f"extends: {QUICKSTART}\nmodel: {{n_layers: 2}}\n", encoding="utf-8")
    child.write_text("extends: base.yaml\nseed: 4\n", encoding="utf-8")
    assert main(["validate", str(child), "--show", "max_seq_len=64"]) == 0
    shown = capsys.readouterr().out
    comments = dict(line.strip().split("  # ") for line in shown.splitlines() if "  # " in line)
    found = {text.strip(): comment for text, comment in comments.items()}
    assert found["seed: 4"] == str(child)
    assert found["n_layers: 2"] == str(base)
    assert found["d_model: 256"] == QUICKSTART
    assert found["max_seq_len: 64"] in ("override", f"${{max_seq_len}} ({QUICKSTART})")
    child.write_text(shown, encoding="utf-8")
    assert load_recipe(child) == load_recipe(QUICKSTART, ["seed=4", "model.n_layers=2", "max_seq_len=64"])
    assert main(["validate", str(child), "--show", "seed=x"]) == 2
    assert capsys.readouterr().out == ""


def test_world_size_and_overrides_in_any_order(capsys):
    assert main(["validate", "--world-size", "3", QUICKSTART, "global_train_batch_size=9"]) == 0
    assert main(["validate", QUICKSTART, "seed=1", "--world-size=3", "global_train_batch_size=8"]) == 2
    assert "global_train_batch_size: 8 sequences are not divisible by the world size, 3" in capsys.readouterr().err


def test_row21_errors_exit_2_without_a_traceback():
    done = moefoundry("validate", QUICKSTART, "model.moe.topk=4", "model.moe.top_k=four", "--seed=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {QUICKSTART}: 3 errors",
        "  --seed: an override has no leading dashes; did you mean 'seed=3'?",
        "  model.moe.top_k: got 'four' (a string); allowed: an integer >= 1",
        "  model.moe.topk: unknown key; did you mean 'model.moe.top_k'?",
    ]


def test_row22_error_names_the_key(capsys):
    assert main(["validate", QUICKSTART, "model.moe.top_k=17"]) == 2
    assert "model.moe.top_k: 17 experts for each token" in capsys.readouterr().err


def test_row23_tags_and_duplicate_keys_exit_2(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("run_name: !!python/object/apply:os.getcwd []\nseed: 1\nseed: 2\n", encoding="utf-8")
    done = moefoundry("validate", str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {path}: 2 errors",
        f"  {path}:1: YAML tag '!!python/object/apply:os.getcwd' is refused; allowed: plain values",
        f"  {path}:3: key 'seed' is given twice (first on line 2)",
    ]


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["seed", "3"], ["seed: an override is written key=value; did you mean 'seed=3'?"]),
        (["seed=1", "--seed", "3"], ["--seed: no such option; overrides are key=value; did you mean 'seed=3'?"]),
        (["--learning", "3", "seed=1"], ["--learning: no such option; overrides are key=value"]),
        (
            ["seed", "max_seq_len"],
            [f"{key}: an override is written key=value; did you mean '{key}=...'?" for key in ("seed", "max_seq_len")],
        ),
        (
            ["--seed", "--max_seq_len", "5"],
            [
                "--seed: no such option; overrides are key=value; did you mean 'seed=...'?",
                "--max_seq_len: no such option; overrides are key=value; did you mean 'max_seq_len=5'?",
            ],
        ),
        (
            ["--world-size", "4", "--seed", "4"],
            ["--seed: no such option; overrides are key=value; did you mean 'seed=4'?"],
        ),
        (["other.yaml"], ["other.yaml: an override is written key=value"]),
    ],
)
def test_overrides_without_an_equals_sign(arguments, problems, capsys):
    assert main(["validate", QUICKSTART, *arguments]) == 2
    _, *lines = capsys.readouterr().err.splitlines()
    assert lines == [f"  {problem}" for problem in problems]


def test_a_key_in_place_of_a_recipe(capsys):
    assert main(["validate", "seed", "3"]) == 2
    assert "seed: no such recipe file; did you mean 'seed=...'?" in capsys.readouterr().err


def test_an_option_that_is_unknown_is_not_taken_for_a_recipe(capsys):
    assert main(["validate", "--seed", "3"]) == 2
    assert "  --seed: no such option; overrides are key=value; did you mean 'seed=3'?\n" in capsys.readouterr().err


def test_a_recipe_that_resembles_no_other_gets_no_suggestion(capsys):
    assert main(["validate", "nofile.yaml"]) == 2
    assert capsys.readouterr().err.endswith("nofile.yaml: no such recipe file\n")


def test_unknown_recipe(capsys):
    assert main(["validate", str(ROOT / "configs" / "quikstart.yaml")]) == 2
    assert f"no such recipe file; did you mean {QUICKSTART!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["a command is missing; there are " + ", ".join(COMMANDS)]),
        (["trian"], ["'trian': no such command; did you mean train?"]),
        (["fly"], ["'fly': no such command; there are " + ", ".join(COMMANDS)]),
        (["--verison"], ["--verison: no such option; did you mean --version?"]),
        (["checkpoint"], ["a command is missing; there are delete, list, show, verify"]),
        (["convert", "exprot"], ["'exprot': no such command; did you mean export?"]),
        (["validate", "--world-size", "0"], ["--world-size: '0' is not a positive integer"]),
        (["plan"], ["--world-size is missing"]),
        (["plan", "x.yaml", "--world-size", "abc"], ["--world-size: 'abc' is not a positive integer"]),
        (["generate", "a", "--prompt", "b", "--topk", "3"], ["--topk: no such option; did you mean --top-k?"]),
        (["generate", "--prompt", "b"], ["CHECKPOINT is missing"]),
        (["generate", "a", "b", "--prompt", "c"], ["Got unexpected extra argument (b)"]),
        (["convert", "import", "a"], ["--output is missing"]),
        (["convert", "import", "a", "--hf", "b", "-o", "c"], ["HF_DIR and --hf are the same; give one"]),
        (["convert", "import", "a", "-o", "c", "--dtype", "fp64"], ["--dtype: 'fp64' is not one of 'fp32'"]),
        (["prepare", "a"], ["OUT is missing"]),
        (["generate", "a", "--https://me:hidden@host/x"], ["no such option"]),
    ],
)
def test_usage_errors_exit_2_and_say_what_is_expected(arguments, words, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 2)
    assert error.startswith("error: ")
    assert "\nUsage: moefoundry" in error
    assert "hidden" not in error
    for word in words:
        assert word in error


def test_validate_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from moefoundry.cli.main import main\n"
        "fp8 = 'precision.fp8={recipe: deepseek_v3, exclude: [layers.0]}'\n"
        f"assert main(['validate', {QUICKSTART!r}, fp8]) == 0\n"
        "heavy = {'torch', 'composer', 'llmfoundry', 'streaming', 'transformers', 'tokenizers', 'numpy', 'pandas',\n"
        "         'matplotlib', 'moefoundry.cli.prepare', 'moefoundry.model.transformer', 'moefoundry.trainer'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_every_command_is_light():
    script = (
        "import sys\n"
        "from moefoundry.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "print(sorted({'torch', 'yaml', 'moefoundry.config', 'moefoundry.cli.train'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "validate" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
