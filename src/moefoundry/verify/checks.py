"""The checks by name, and a run of some of them."""

from __future__ import annotations

import importlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from moefoundry.config import UserError
from moefoundry.verify.ranks import RankError
from moefoundry.verify.result import Result
from moefoundry.verify.twin import Twin

CHECKS = {
    "meshes": "losses and gradients are the same on every mesh",
    "balance": "balance losses are what they are defined to be, however the batch is computed",
    "round_trip": "a Hugging Face round trip loses nothing",
    "order": "batches do not depend on ranks or loader processes, and none comes twice",
    "resume": "a run goes on with the same bits after SIGKILL, and on other meshes",
    "fp8": "FP8 stays near BF16",
}
"""Names and what they ask; each is the function ``check`` of the module of that name."""
FAULTS = {"faults": "what a killed rank, a damaged checkpoint, a damaged shard and a stall cost"}
"""Further checks, on request."""


@dataclass(frozen=True)
class Answer:
    """Results of a check.

    Attributes:
        check: Its name.
        results: At least one.
        seconds: Time that it took.
    """

    check: str
    results: list[Result]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Convert to plain values; a figure that is not finite becomes null."""
        values = asdict(self)
        for result in values["results"]:
            if result["figure"] is not None and not math.isfinite(result["figure"]):
                result["figure"] = None
        return values

    @property
    def passed(self) -> bool:
        """True if nothing has failed."""
        return all(result.passed is not False for result in self.results)


def run(twin: Twin, names: Sequence[str]) -> Iterator[Answer]:
    """Run checks; what one cannot do is a result of it, and the others run."""
    for name in names:
        begun, results = time.perf_counter(), []
        check: Callable[[Twin], Iterator[Result]] = importlib.import_module(f"moefoundry.verify.{name}").check
        try:
            for result in check(twin):
                results.append(result)  # noqa: PERF402  # those before an error are kept
        except Exception as error:
            known = isinstance(error, UserError | RankError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            if not known:
                traceback.print_exc()
            results.append(Result("runs to its end", False, detail=" ".join(text.split())))
        yield Answer(name, results, time.perf_counter() - begun)
