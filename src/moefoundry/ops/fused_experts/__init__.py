"""A local MoE layer's expert work in few kernels that read and write as little as they can, for GPUs."""

from moefoundry.ops.fused_experts.function import fused_experts, obstacle

__all__ = ["fused_experts", "obstacle"]
