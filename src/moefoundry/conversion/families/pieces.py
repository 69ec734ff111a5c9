"""The unit of conversion: a block of one of our tensors that equals a block of one Hugging Face tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """``ours[expert] == theirs[rows]``, transposed where it says so; the values are the same bit for bit.

    Attributes:
        name: Our parameter or buffer, as in ``MoETransformer.state_dict()``.
        hf_name: Tensor of the Hugging Face checkpoint.
        expert: Index along our first dim, where experts are stacked; None is the whole tensor.
        rows: First row and the row behind the last of the Hugging Face tensor; None is the whole tensor.
        transposed: Whether the two-dimensional block is stored the other way round there.
    """

    name: str
    hf_name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
