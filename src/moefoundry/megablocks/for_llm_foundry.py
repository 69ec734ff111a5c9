"""``ffn_type: mb_moe`` and ``mb_dmoe`` of LLM Foundry where MegaBlocks' extension is absent.

LLM Foundry finds the two builders by its entry points. It asks for them before it needs anything of MegaBlocks, so
that importing this module is early enough. Without the package, LLM Foundry says so itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from llmfoundry.models.layers import ffn
from llmfoundry.models.utils import param_init_fns
from torch import nn

from moefoundry.megablocks.provider import check_versions, provide


def build_mb_moe(**options: Any) -> nn.Module:
    """Build MegaBlocks' MoE with a capacity, as LLM Foundry does.

    Args:
        options: ``d_model``, ``expansion_ratio`` and the others of ``llmfoundry.models.layers.ffn.build_mb_moe``.

    Raises:
        ImportError: MegaBlocks is not installed, or of another version.
    """
    check_versions()
    return ffn.build_mb_moe(**options)


def build_mb_dmoe(**options: Any) -> nn.Module:
    """Build MegaBlocks' dropless MoE, as LLM Foundry does; arguments and errors as for :func:`build_mb_moe`."""
    check_versions()
    return ffn.build_mb_dmoe(**options)


if find_spec("megablocks") is not None:
    provide()
    import megablocks

    # both looked for it when they were imported, and may not have found it
    ffn.megablocks = param_init_fns.megablocks = megablocks
    ffn.is_megablocks_imported = True
