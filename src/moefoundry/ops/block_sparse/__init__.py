"""Block-sparse experts as in MegaBlocks, on the kernels of ``stanford-stk``: ``model.moe.backend: megablocks``."""

from moefoundry.ops.block_sparse.function import block_sparse_experts, obstacle

__all__ = ["block_sparse_experts", "obstacle"]
