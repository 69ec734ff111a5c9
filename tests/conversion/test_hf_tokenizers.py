"""Tokenizers on their way in and out: what nothing reads is refused, and what goes out works as users call it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefoundry.config import UserError
from moefoundry.conversion.convert import export_hf, import_hf, load_model
from moefoundry.conversion.upcycle import Upcycling, upcycle
from moefoundry.data.tokenizer import load_tokenizer
from moefoundry.evaluation.generation import complete
from tests.conversion.hf import change_config, family_config, write_hf, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
PROMPT = "def first<fim_begin>"
VERSION_5 = {
    "tokenizer_class": "TokenizersBackend",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "extra_special_tokens": ["<fim_begin>"],
    "backend": "tokenizers",
    "max_length": 8,
}


def directory(path: Path, family: str = "mixtral", tokenizer_config: dict[str, Any] | None = None) -> Path:
    """A model with a tokenizer."""
    hf = write_hf(path, family, replace(family_config(family), vocab_size=270))
    for file in write_tokenizer(path.with_name(f"{path.name}-tokenizer")).iterdir():
        file.rename(hf / file.name)
    if tokenizer_config is not None:
        (hf / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (hf / "special_tokens_map.json").unlink()
    return hf


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "tokenizer_config",
    [
        None,
        VERSION_5,
        {"eos_token": "<|endoftext|>", "tokenizer_class": None, "model_input_names": None},
        {"eos_token": "<|endoftext|>", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    ],
    ids=["prepared", "version_5", "bare", "types"],
)
def test_an_exported_directory_generates_as_users_write_it(
    tmp_path: Path, tokenizer_config: dict[str, Any] | None
) -> None:
    """And says what is said here, up to the same token."""
    hf = directory(tmp_path / "hf", tokenizer_config=tokenizer_config)
    import_hf(hf, tmp_path / "checkpoint")
    text = complete(load_model(tmp_path / "checkpoint"), tmp_path / "checkpoint/tokenizer", PROMPT, 12)
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(tokens[0]) == text
    assert len(text) > len(PROMPT)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": [0, 7]}, None, [0, 7]),
        ({"eos_token_id": 7}, {"eos_token_id": 9, "temperature": 0.6}, [9, 7, 0]),
        ({"eos_token_id": 0}, {"eos_token_id": 0}, 0),
        ({"eos_token_id": None}, {"temperature": 0.6}, 0),
    ],
)
def test_end_tokens_of_all_files_travel_along(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: object
) -> None:
    """Through the tokenizer that data are prepared with, too, which a run's export takes."""
    hf = change_config(directory(tmp_path / "hf"), **config)
    if generation is not None:
        (hf / "generation_config.json").write_text(json.dumps(generation))
    import_hf(hf, tmp_path / "checkpoint")
    load_tokenizer(tmp_path / "checkpoint/tokenizer").save(tmp_path / "prepared")
    for number, tokenizer in enumerate((None, tmp_path / "prepared")):
        export_hf(tmp_path / "checkpoint", back := tmp_path / f"back{number}", tokenizer=tokenizer)
        assert read(back / "config.json")["eos_token_id"] == expected
        assert read(back / "generation_config.json")["eos_token_id"] == expected
        assert read(back / "generation_config.json").get("temperature") == (generation or {}).get("temperature")


def test_end_tokens_without_a_tokenizer_travel_along(tmp_path: Path) -> None:
    hf = change_config(
        write_hf(tmp_path / "hf", "mixtral", family_config("mixtral")), eos_token_id=[3, 4], bos_token_id=1
    )
    assert import_hf(hf, tmp_path / "checkpoint").has_tokenizer is False
    assert export_hf(tmp_path / "checkpoint", tmp_path / "back").has_tokenizer is False
    assert read(tmp_path / "back/config.json").items() >= {"eos_token_id": [3, 4], "bos_token_id": 1}.items()


@pytest.mark.parametrize("files", [["tokenizer.model"], ["vocab.json", "merges.txt"]])
def test_a_tokenizer_that_nothing_here_reads_is_refused(tmp_path: Path, files: list[str]) -> None:
    hf = write_hf(tmp_path / "hf", "llama", family_config("llama"))
    for file in files:
        (hf / file).write_text("{}")
    message = r"its tokenizer has no tokenizer\.json; transformers makes one: AutoTokenizer\.from_pretrained"
    with pytest.raises(UserError, match=message):
        import_hf(hf, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=message):
        upcycle(hf, tmp_path / "checkpoint", Upcycling(num_experts=2, top_k=1))
    assert not (tmp_path / "checkpoint").exists()


def test_a_tokenizer_that_is_damaged_is_refused(tmp_path: Path) -> None:
    hf = directory(tmp_path / "hf")
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        import_hf(hf, tmp_path / "checkpoint")
