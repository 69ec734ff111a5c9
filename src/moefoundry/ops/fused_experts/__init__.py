"""Fused Triton kernels for the experts of one GPU."""

from moefoundry.ops.fused_experts.function import fused_experts, obstacle

__all__ = ["fused_experts", "obstacle"]
