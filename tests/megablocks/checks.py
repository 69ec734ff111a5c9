"""Checks of ``test_provide.py``, each run by a process of its own: the provider changes modules of other packages."""

from __future__ import annotations

import sys
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.config import MoEConfig, RouterConfig
from moefoundry.moe.layer import MoELayer

D, HIDDEN, E = 128, 128, 8


def dmoe(**options: Any) -> nn.Module:
    """Make MegaBlocks' dropless MoE of SwiGLU experts in fp32, without losses unless they are given."""
    from moefoundry.megablocks import provide

    provide()
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    usual: dict[str, Any] = {
        "hidden_size": D,
        "ffn_hidden_size": HIDDEN,
        "bias": False,
        "return_bias": False,
        "activation_fn": F.silu,
        "moe_num_experts": E,
        "moe_loss_weight": 0.0,
        "mlp_type": "glu",
        "fp16": False,
    }
    return dMoE(Arguments(**(usual | options)))


def fail_to_import() -> None:
    """Import MegaBlocks before the provider is called, as LLM Foundry does; modules of it stay behind.

    Importing the provider alone changes nothing.
    """
    import moefoundry.megablocks  # noqa: F401

    assert not {"megablocks_ops", "grouped_gemm", "stk"} & set(sys.modules)
    with suppress(ModuleNotFoundError):
        import megablocks  # noqa: F401


def check_dmoe_equals_the_loop_backend(mlp_impl: str, top_k: int, normalize: bool) -> None:
    """Output and gradients with the same weights; expert 0 is chosen often and the last never."""
    torch.manual_seed(0)
    theirs = dmoe(mlp_impl=mlp_impl, moe_top_k=top_k, moe_normalize_expert_weights=1 if normalize else None)
    router = RouterConfig(normalize_topk=normalize)
    ours = MoELayer(D, MoEConfig(E, top_k, HIDDEN, num_shared_experts=0, router=router, backend="loop"))
    mlp, gate = theirs.experts.mlp, theirs.router.layer.weight
    experts = ours.experts
    with torch.no_grad():
        gate[0] += 0.05
        gate[-1] = -1.0
        for weight in (mlp.w1, mlp.v1, mlp.w2):
            nn.init.normal_(weight, std=D**-0.5)
        ours.router.gate.weight.copy_(gate)
        experts.gate_proj.copy_(mlp.w1.view(E, HIDDEN, D))
        experts.up_proj.copy_(mlp.v1.view(E, HIDDEN, D))
        experts.down_proj.copy_(mlp.w2.view(E, HIDDEN, D).mT)
    x, incoming = torch.rand(2, 20, D, requires_grad=True), torch.randn(2, 20, D)
    got, (expected, stats) = theirs(x), ours(x)
    counts = stats.tokens_per_expert.tolist()
    assert counts[-1] == 0
    assert max(counts) > min(counts[:-1])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(got, [x, gate, mlp.w1, mlp.v1, mlp.w2], incoming)
    wanted = torch.autograd.grad(
        expected, [x, ours.router.gate.weight, experts.gate_proj, experts.up_proj, experts.down_proj], incoming
    )
    wanted = (*wanted[:2], *(w.reshape(E * HIDDEN, D) for w in wanted[2:4]), wanted[4].mT.reshape(E * HIDDEN, D))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-4)


def check_lists_stay_empty() -> None:
    """Check that with both weights 0 MegaBlocks appends nothing to its module-level lists.

    That holds in training, in evaluation and under reentrant checkpointing.
    """
    from torch.utils.checkpoint import checkpoint

    layer, x = dmoe(mlp_impl="grouped", moe_top_k=2), torch.rand(1, 8, D, requires_grad=True)
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    layer(x).sum().backward()
    layer.eval()(x)
    assert lists() == (0, 0)
    counted = dmoe(mlp_impl="grouped", moe_top_k=2, moe_loss_weight=0.1, moe_zloss_weight=0.1)
    counted(x)
    assert lists() == (1, 1)  # so that zeros above mean something


def check_own_backend_leaves_lists_alone() -> None:
    """Our layer on the block-sparse backend has its losses returned, and MegaBlocks knows nothing of it."""
    dmoe()
    layer = MoELayer(D, MoEConfig(E, 2, HIDDEN, num_shared_experts=0, backend="megablocks"))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    out, stats = layer(torch.randn(1, 8, D))
    assert stats.balance_loss.requires_grad
    assert out.shape == (1, 8, D)
    assert lists() == (0, 0)


def lists() -> tuple[int, int]:
    """Entries of MegaBlocks' lists of balance losses and of router logits."""
    from megablocks.layers import moe, router

    return len(moe.get_load_balancing_loss()), len(router._ROUTER_LOGITS)


def check_real_extensions_win() -> None:
    """Modules that can be imported already are those that MegaBlocks gets."""
    real = {name: ModuleType(name) for name in ("megablocks_ops", "grouped_gemm")}
    real["grouped_gemm"].backend = real["grouped_gemm"].ops = object()  # type: ignore[attr-defined]
    sys.modules.update(real)
    dmoe(mlp_impl="sparse")
    assert sys.modules["megablocks.ops.sort"].ops is real["megablocks_ops"]
    assert sys.modules["megablocks.grouped_gemm_util"].backend is real["grouped_gemm"].backend


def declare_entry_points() -> None:
    """Let this process find the entry points of ``pyproject.toml``, whatever the installed package has."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    group = "llmfoundry_ffns_with_megablocks"
    lines = [f"{name} = {value}" for name, value in project["entry-points"][group].items()]
    info = Path(tempfile.mkdtemp()) / "declared-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    sys.path.insert(0, str(info.parent))


def check_llm_foundry_builds(ffn_type: str) -> Tensor:
    """Train an MPT of LLM Foundry with MegaBlocks' experts for three steps; [3, 3] total, language, balance losses."""
    declare_entry_points()
    from llmfoundry.models.mpt.modeling_mpt import ComposerMPTCausalLM
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = ComposerMPTCausalLM(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())),
        d_model=128,
        n_heads=2,
        n_layers=2,
        expansion_ratio=1,
        max_seq_len=16,
        vocab_size=64,
        no_bias=True,
        attn_config={"attn_impl": "torch"},
        loss_fn="torch_crossentropy",
        ffn_config={
            "ffn_type": ffn_type,
            "mlp_type": "glu" if ffn_type == "mb_dmoe" else "mlp",
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_loss_weight": 0.05,
            "moe_world_size": 1,
            "lbl_process_group": None,
            "uniform_expert_assignment": False,
        },
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(64, (2, 16))
    batch, found = {"input_ids": ids, "labels": ids}, []
    for _ in range(3):
        losses = model.loss(model(batch), batch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        found.append(torch.stack([losses["total"], losses["loss"], losses["lbl"]]).detach())
    return torch.stack(found)
