"""Exported models load in vLLM: it knows the architecture, reads the config, takes each tensor, and lacks none.

``MOEFOUNDRY_SERVING`` names a directory with vLLM and what it imports (docs/conversion.md); all results of all families
come from one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.tensor_map import Dtype, TensorMap
from moefoundry.model.transformer import meta_model
from tests.conversion.families.models import CASES, VARIANTS

PLACE = Path(os.environ.get("MOEFOUNDRY_SERVING", "/nowhere"))
SCRIPT = Path(__file__).with_name("vllm_loads.py")
FIRST = 1000.0  # of the tensors' numbers: none that its own buffers hold
pytestmark = pytest.mark.skipif(
    not (PLACE / "vllm").is_dir(), reason="MOEFOUNDRY_SERVING names no directory with vLLM in it"
)

BY_TRANSFORMERS = ("olmo2", "olmo3", "phimoe", "mellum", "dots1", "solar_open", "flex_olmo", "hunyuan_v1_moe")
"""Families of which vLLM has no model of its own, and takes that of transformers."""
LISTED, WINDOWED = "down_proj.weight", "Sliding window for some but all layers is not supported"
REFUSED = {
    **dict.fromkeys(("dbrx-plain", "dbrx-clipped", "dbrx-not_normalized"), "experts.w13_weight"),
    **dict.fromkeys(("glm4_moe_lite-dense_between", "hy_v3-between", "glm_moe_dsa-yarn"), LISTED),
    **dict.fromkeys(("qwen2-windows", "qwen3-windows"), WINDOWED),
    "gpt_oss-unscaled": "factor",
}
"""What vLLM 0.33.0 does not load, and a part of its error: DBRX, for a name that its own model lacks; dense blocks
after the first ones, windows in some blocks, and a gpt-oss without YaRN."""
TIED = (
    *("olmoe-normalized", "deepseek_v3-no_shared", "deepseek_v32-dense", "glm4_moe-whole", "minimax_m2-whole"),
    *("qwen3_next-all_full", "gpt_oss-windows", "afmoe-scaled"),
)
"""Models that it does not tie: it wants a head of their own."""
BIASED = (
    *("olmoe-biased", "granitemoe-biased", "hy_v3-biased", "qwen3-biased", "qwen3_moe-biased", "qwen3_next-all_full"),
)
"""Models of whose attention it passes over biases."""
UNBIASED = "gpt_oss-windows"
"""A model without biases in its attention, for which it wants some."""
cases = pytest.mark.parametrize("name", [f"{family}-{variant}" for family, variant in CASES])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("serving")
    for family, variant in CASES:
        write_numbered(root / f"{family}-{variant}", family, variant)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PLACE), *sys.path])}
    done = subprocess.run([sys.executable, str(SCRIPT), str(root)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    return found


def write_numbered(directory: Path, family: str, variant: str) -> None:
    """Write what export writes of a model, each tensor filled with its number."""
    cfg = VARIANTS[family][variant]
    ours = {name: TensorSpec(tuple(t.shape), torch.float32) for name, t in meta_model(cfg).state_dict().items()}
    specs = TensorMap(FAMILIES[family], cfg).their_specs(ours, Dtype.keep)
    directory.mkdir()
    numbered = {name: torch.full(spec.shape, FIRST + number) for number, (name, spec) in enumerate(specs.items())}
    save_file(numbered, directory / "model.safetensors", {"format": "pt"})
    config = FAMILIES[family].write_config(cfg, max_seq_len=64, torch_dtype="float32")
    (directory / "config.json").write_text(json.dumps(config))


@cases
def test_vllm_takes_what_is_exported(results: dict[str, Any], name: str) -> None:
    found = results[name]
    if name in REFUSED:
        assert REFUSED[name] in found["error"]
        return
    assert "error" not in found
    family = name.partition("-")[0]
    assert found["class"].startswith("Transformers") == (family in BY_TRANSFORMERS)
    missing = [each for each in found["missing"] if name != UNBIASED or not each.endswith("_proj.bias")]
    assert missing == (["lm_head.weight"] if name in TIED else [])
    assert all(each.endswith("proj.bias") for each in found["unread"])
    assert bool(found["unread"]) == (name in BIASED)
