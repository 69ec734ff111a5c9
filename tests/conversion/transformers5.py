"""What transformers 5 does, in a process of its own: ``python -m tests.conversion.transformers5 ACTION DIR``.

    save   DIR/{family}-{variant}          a model of each family in each variant, saved with random weights
           DIR/{family}-{variant}-fused    the same, with its experts in one tensor, as they are in memory
    load   every directory of DIR
    adapt  DIR/*/exported, with the adapters in DIR/*/peft
    write  text with each, as users do; and each directory's tokenizer, saved anew, to {name}/tokenizer5

All write ``DIR/results.pt``: logits and greedy tokens of each model by name; what was missing or unexpected of each; or
the text.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moefoundry.conversion.families import FAMILIES
from tests.conversion.families.models import CASES, VARIANTS, VOCAB, randomize

NEW_TOKENS = 12
PROMPT = "def first<fim_begin>"
OPTIONS = {"attn_implementation": "eager"}


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def results_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        tokens = model.generate(ids()[:1, :6], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        return {"logits": model(ids()).logits, "tokens": tokens[0, 6:]}


def save(directory: Path) -> None:
    results = {}
    for family, variant in CASES:
        name = f"{family}-{variant}"
        config = FAMILIES[family].write_config(VARIANTS[family][variant], max_seq_len=64, torch_dtype="float32")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **OPTIONS)
        randomize(model, seed=0)
        model.tie_weights()
        model.save_pretrained(directory / name)
        model.save_pretrained(directory / f"{name}-fused", save_original_format=False)
        results[name] = results_of(model)
    torch.save(results, directory / "results.pt")


def load(directory: Path) -> None:
    results = {}
    for path in sorted(path for path in directory.iterdir() if (path / "config.json").exists()):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **OPTIONS
        )
        odd = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
        results[path.name] = results_of(model) | {"odd": odd}
    torch.save(results, directory / "results.pt")


def adapt(directory: Path) -> None:
    from peft import PeftModel

    results = {}
    for path in sorted(path for path in directory.iterdir() if path.is_dir()):
        model = AutoModelForCausalLM.from_pretrained(path / "exported", dtype=torch.float32, **OPTIONS)
        with torch.no_grad():
            results[path.name] = {"logits": PeftModel.from_pretrained(model, path / "peft").eval()(ids()).logits}
    torch.save(results, directory / "results.pt")


def write(directory: Path) -> None:
    results = {}
    for path in sorted(path for path in directory.iterdir() if (path / "config.json").exists()):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        results[path.name] = {"text": tokenizer.decode(tokens[0])}
        tokenizer.save_pretrained(path / "tokenizer5")
    torch.save(results, directory / "results.pt")


if __name__ == "__main__":
    {"save": save, "load": load, "adapt": adapt, "write": write}[sys.argv[1]](Path(sys.argv[2]))
