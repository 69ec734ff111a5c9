"""The base of adapters: the checkpoint of the weights that do not train.

A run with ``lora`` saves what trains, and names its base in ``state.json``:

    base: {place: /models/olmoe, digest: 0f3c...}

The digest is one of the hashes of all tensors, so weights that were imported twice, or copied, are the same base. A run
that goes on reads the base again, from ``lora.base``, or from the place in ``state.json``, or from ``load_path``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.fetch import checkpoint_at
from moefoundry.checkpoint.manifest import BASE, DATA_SUFFIX, Manifest, digest, read_state
from moefoundry.checkpoint.remote import find_remote, is_downloaded, origin_of
from moefoundry.checkpoint.store import find_checkpoint
from moefoundry.config import Recipe, UserError
from moefoundry.config.secrets import redact
from moefoundry.config.urls import is_url, resolved


@dataclass(frozen=True)
class Base:
    """A checkpoint of frozen weights.

    Attributes:
        checkpoint: Its directory on this machine.
        digest: Digest of its tensors.
    """

    checkpoint: Path
    digest: str

    def document(self) -> dict[str, str]:
        """Give what a checkpoint of adapters says of it."""
        place = origin_of(self.checkpoint) or str(self.checkpoint.resolve())
        return {"place": redact(place), "digest": self.digest}


def find_base(recipe: Recipe, start: Path | None, cache: Path) -> Base:
    """Find the base of a run with ``lora``; one rank calls it.

    Args:
        recipe: The recipe.
        start: Checkpoint that the run starts from, of adapters or of whole weights; None where it names none.
        cache: Directory for the small files of a base behind a URL.

    Raises:
        UserError: None of the places has a checkpoint of whole weights, or none has those that the adapters were
            trained on; or the recipe names two.
    """
    assert recipe.lora is not None, "asked for by the caller"
    adapters = None if start is None else read_state(start).get(BASE)
    if start is not None and adapters is None:
        if recipe.lora.base is not None:
            raise UserError(
                f"lora.base: {start}, the checkpoint of load_path, has whole weights; leave one of them out"
            )
        return whole_base(start)
    if recipe.lora.base is not None:
        places = [recipe.lora.base]
    else:
        assert adapters is not None, "checked with the recipe"
        places = list(dict.fromkeys([adapters["place"], *([recipe.load_path] if recipe.load_path else [])]))
    problems = []
    for place in places:
        try:
            return _same(whole_base(_checkpoint_of(place, cache)), adapters, place)
        except UserError as error:
            problems.append(str(error))
    raise UserError(
        f"lora.base: {'; '.join(problems)}; name the checkpoint of the frozen weights: lora.base=CHECKPOINT"
    )


@contextmanager
def base_at(checkpoint: Path, place: str | None = None) -> Iterator[Path | None]:
    """Give the base of a checkpoint of adapters for as long as it is needed; None for one of whole weights.

    Args:
        checkpoint: The checkpoint.
        place: Where the base is now, a path or a URL; None is where it was.

    Raises:
        UserError: There is no checkpoint, or it is another one.
    """
    adapters = read_state(checkpoint).get(BASE)
    if adapters is None:
        if place is not None:
            raise UserError(f"{checkpoint} has whole weights, and no base")
        yield None
        return
    with ExitStack() as stack:
        try:
            path = stack.enter_context(checkpoint_at(place or adapters["place"]))
            found = path if is_downloaded(path) else _newest(path)
            base = _same(whole_base(found), adapters, place or adapters["place"])
        except UserError as error:
            remedy = "with its new place, moefoundry convert merge makes whole weights: --base CHECKPOINT"
            raise UserError(f"base of the adapters in {checkpoint}: {error}; {remedy}") from error
        yield base.checkpoint


def digest_of_tensors(checkpoint: Path) -> str:
    """Hash the hashes of all tensors of a checkpoint."""
    files = Manifest.read(checkpoint).files
    hashes = {name: [each.digest for each in files[name]] for name in sorted(files) if name.endswith(DATA_SUFFIX)}
    return digest(json.dumps(hashes).encode())


def _checkpoint_of(place: str, cache: Path) -> Path:
    path = resolved(place)
    found = find_remote(place, cache) if is_url(path) else _newest(Path(path))
    if found is None:
        raise UserError(f"no complete checkpoint at {place}")
    return found


def _newest(path: Path) -> Path:
    """Find the checkpoint that a directory is, or the newest of the run that it holds."""
    try:
        return find_checkpoint(str(path))
    except UserError:
        raise UserError(f"no complete checkpoint at {path}") from None


def whole_base(checkpoint: Path) -> Base:
    """Take a checkpoint as a base.

    Raises:
        UserError: It has adapters alone.
    """
    if BASE in read_state(checkpoint):
        raise UserError(f"{checkpoint} has adapters alone; merge them first: moefoundry convert merge {checkpoint}")
    return Base(checkpoint, digest_of_tensors(checkpoint))


def _same(base: Base, adapters: Mapping[str, Any] | None, place: str) -> Base:
    if adapters is not None and base.digest != adapters["digest"]:
        known = f"digest {base.digest} here, {adapters['digest']} there"
        raise UserError(f"{place} is not the base that the adapters were trained on ({known})")
    return base
