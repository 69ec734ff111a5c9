"""The parts of a corpus as tasks of a Ray cluster.

The cluster starts tasks again whose worker or machine has died; a task that is started again goes on with the blocks
that its first attempt has left. SOURCE, the tokenizer and OUT must be at the same paths on all machines.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moefoundry.config.errors import UserError
from moefoundry.data import prepare
from moefoundry.data.opening import open_all
from moefoundry.data.options import Part, PrepareOptions, expanded
from moefoundry.data.parts import PartSummary, check_part, merge_parts, prepare_part
from moefoundry.data.prepare import PreparedSummary
from moefoundry.data.progress import Progress

MOST_PARTS = 1000


def prepare_with_ray(options: PrepareOptions, address: str) -> PreparedSummary:
    """Prepare a corpus on a Ray cluster.

    Args:
        options: As for parts: documents, and a tokenizer.
        address: The cluster: ``auto``, ``ray://HOST:PORT``, or ``local`` for one of this machine.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or a part fails.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("ray: not installed; pip install ray") from error
    options = _absolute(expanded(options))
    whole = Part(1, 1)
    check_part(options, whole)
    opened = open_all(options, prepare.BLOCK_BYTES)
    count = min(len(opened.blocks), MOST_PARTS) or 1
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"ray={address}: {' '.join(str(error).split())}") from error
    try:
        alone = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
        task = ray.remote(max_retries=-1, num_cpus=1, runtime_env=alone)(_run)
        pending = [task.remote(options, number, count) for number in range(1, count + 1)]
        with Progress("parts") as progress:
            while pending:
                (done,), pending = ray.wait(pending)
                progress.update(ray.get(done).documents, 0)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, UserError) else UserError(f"ray: a part failed: {cause!r}") from error
    finally:
        ray.shutdown()
    assert isinstance(options.out, Path)
    return merge_parts(options.out, options.overwrite)


def _run(options: PrepareOptions, number: int, count: int) -> PartSummary:
    return prepare_part(options, Part(number, count))


def _absolute(options: PrepareOptions) -> PrepareOptions:
    """Make the paths absolute, as workers start elsewhere, and let a worker do all itself."""
    return replace(
        options,
        source=options.source if options.source == "stdlib" else str(Path(options.source).absolute()),
        out=options.out.absolute() if isinstance(options.out, Path) else options.out,
        tokenizer=options.tokenizer and options.tokenizer.absolute(),
        workers=0,
    )
