"""What the published ``config.json`` files say, of the models that ``configs/pretrain`` has recipes for.

``published.json`` has what each says beside :data:`COMMON`, of which null leaves a key out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in (COMMON | own).items() if value is not None or key not in COMMON}
    for name, own in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}
SAY_THE_SAME = ("glm4_moe_lite", "glm_moe_dsa", "hy_v3", "qwen3_5_moe_text", "sarvam_moe", "bailing_moe")
"""Families whose published model an earlier one has, too."""
