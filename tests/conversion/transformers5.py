"""What the transformers of today computes, in a process of its own: ``transformers5.py compute|adapt DIR``.

    compute  DIR/cases.json has a config by name: DIR/{name} is its model with random weights, saved; DIR/{name}-ours
             the same weights with the config as it was given, loaded again; DIR/{name}-gradients holds the gradients
             under the same names; DIR/{name}-fused the model with its experts in one tensor, as they are in memory,
             where it is the family's first. It also has sizes by family, to be filled up with defaults. Every directory
             that is there already is loaded: where it has a tokenizer, text is written with it; where its experts are
             in MXFP4, they are unpacked before
    adapt    every directory of DIR: the model in its "exported" with the adapters in its "peft"

Both write DIR/results.pt: logits, loss and greedy tokens of each model by name; the defaults; what was missing or
unexpected, and the text. It imports nothing of this project.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

VOCAB, LENGTH, NEW_TOKENS = 61, 24, 8
LONG = 150  # tokens: more than linear attention takes at a time
PROMPT = "def first<fim_begin>"
ZERO_CENTERED = ("qwen3_next", "qwen3_5")
OPTIONS = {"attn_implementation": "eager"}
WRITERS = ("-plain", "-window", "-yarn")


def sample(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Norms' factors about 1, and expert biases in [0, 0.5]: no score plus bias is below 0, the value that some
    versions of DeepSeek give to experts outside a token's groups (here, as in DeepSeek's own code, it is minus
    infinity)."""
    generator = torch.Generator().manual_seed(seed)
    zero_centered = getattr(getattr(model, "config", None), "model_type", "").startswith(ZERO_CENTERED)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(0.0, 0.5, generator=generator)
            else:
                about_1 = "norm" in name and tensor.dim() == 1 and (not zero_centered or "linear_attn" in name)
                tensor.normal_(1.0 if about_1 else 0.0, 0.2, generator=generator)


def results_of(model: torch.nn.Module, name: str, writers: tuple[str, ...] = WRITERS) -> dict[str, torch.Tensor]:
    """Logits; and for one variant of each family, and where a window or other positions matter, generated tokens."""
    model.eval()
    with torch.no_grad():
        found = {"logits": model(sample()).logits}
        if name.endswith(writers):
            tokens = model.generate(sample()[:1, :6], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
            found["tokens"] = tokens[0, 6:]
        return found


def compute(directory: Path) -> None:
    results: dict[str, Any] = {path.name: loaded(path) for path in sorted(directory.iterdir()) if path.is_dir()}
    asked = json.loads((directory / "cases.json").read_text())
    results["defaults"] = {}
    for family, sizes in asked["defaults"].items():
        results["defaults"][family] = json.loads(AutoConfig.for_model(family, **sizes).to_json_string(use_diff=True))
    for name, config in asked["configs"].items():
        text = json.dumps(config)  # its class adds to the mapping
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **OPTIONS)
        randomize(model, seed=0)
        model.tie_weights()
        model.save_pretrained(directory / name)
        ours = directory / f"{name}-ours"
        ours.mkdir()
        os.link(directory / name / "model.safetensors", ours / "model.safetensors")
        (ours / "config.json").write_text(text)
        results[ours.name] = loaded(ours, name)
        if name.endswith("-plain"):
            model.save_pretrained(directory / f"{name}-fused", save_original_format=False)
        results[name] = results_of(model, name)
        if "linear_attention" in config.get("layer_types", ()):
            with torch.no_grad():
                results[name]["long"] = model(sample(LONG)).logits
        loss = model(sample(), labels=sample()).loss
        loss.backward()
        results[name]["loss"] = loss.detach()
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        model.save_pretrained(directory / f"{name}-gradients")
    torch.save(results, directory / "results.pt")


def unpacked(directory: Path) -> torch.nn.Module:
    """The model of a directory in MXFP4, by its own function: its loader wants kernels, or accelerate."""
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(directory / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        tensors[name] = convert_moe_packed_tensors(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, **OPTIONS)
    model.load_state_dict(tensors)
    return model.float()


def loaded(path: Path, name: str = "") -> dict[str, Any]:
    """Results of a directory, computed as those of ``name``, or of its own name."""
    name = name or path.name
    if "quantization_config" in json.loads((path / "config.json").read_text()):
        return results_of(unpacked(path), name)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **OPTIONS)
    found: dict[str, Any] = {"odd": {kind: sorted(map(str, names)) for kind, names in info.items() if names}}
    if not (path / "tokenizer.json").exists():
        return found | results_of(model, name, WRITERS[:1])
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False)
    tokenizer.save_pretrained(path / "tokenizer5")
    return found | {"text": tokenizer.decode(tokens[0])}


def adapt(directory: Path) -> None:
    from peft import PeftModel

    results = {}
    for path in sorted(path for path in directory.iterdir() if path.is_dir()):
        model = AutoModelForCausalLM.from_pretrained(path / "exported", dtype=torch.float32, **OPTIONS)
        with torch.no_grad():
            results[path.name] = {"logits": PeftModel.from_pretrained(model, path / "peft").eval()(sample()).logits}
    torch.save(results, directory / "results.pt")


if __name__ == "__main__":
    {"compute": compute, "adapt": adapt}[sys.argv[1]](Path(sys.argv[2]))
