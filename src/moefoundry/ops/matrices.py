"""Weight matrices that Muon orthogonalizes: which they are, and how ranks divide them. Plans read this without torch.

Ranks that have some rows of each of many matrices share the work. The matrices are listed by their cost, largest first;
of W ranks, rank j mod W has matrix j as a whole for a moment. So ranks compute about as much, and none more than the
first.
"""

from __future__ import annotations

from collections.abc import Sequence

ITERATIONS = 5
"""Newton-Schulz steps."""

ELEMENTS_AT_ONCE = 2**25
"""Elements of the matrices of a stack that are orthogonalized together; a larger one is alone."""

_LEFT_OUT = frozenset(("embed_tokens", "lm_head"))


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Tell if Muon updates a parameter: a weight matrix [R, C], or a stack of them [E, R, C].

    Embeddings, the output head and biases are left out, and what has a side of 1, as a convolution's kernel [C, 1, K].

    Args:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
    """
    sides = len(shape) in (2, 3) and min(shape[-2:]) > 1
    return sides and not name.endswith("bias") and not _LEFT_OUT & {*name.split(".")}


def rows_of_ranks(rows: int, ranks: int) -> list[int]:
    """Divide rows as ``torch.chunk`` and FSDP do: the last ranks may have fewer, or none."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


def orthogonalization_flops(rows: int, columns: int) -> int:
    """Count the FLOPs of a matrix: three products an iteration."""
    short, long = sorted((rows, columns))
    return ITERATIONS * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)


def largest_first(shape: tuple[int, int]) -> tuple[int, int, int]:
    """Give the key by which matrices are sorted."""
    return -orthogonalization_flops(*shape), *shape
