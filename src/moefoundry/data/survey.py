"""First reading of a corpus: its size and digest, block by block, and what cannot be read.

The digest of packed samples' documents is one of the whole stream, as it has always been, so it is computed in order;
that of documents is one of the blocks' digests, which any number of processes compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from moefoundry.config.errors import UserError
from moefoundry.data.blocks import Block, name_in_file
from moefoundry.data.corpus import Corpus, Document, add_to_digest
from moefoundry.data.left_out import LeftOut
from moefoundry.data.progress import Progress
from moefoundry.data.workers import Advance, run_jobs


@dataclass(frozen=True)
class Surveyed:
    """A block that was read once.

    Attributes:
        block: The block.
        documents: Number of its documents that are used, the first.
        bytes: UTF-8 size of these.
        sha256: Digest of their ids and texts, in order.
    """

    block: Block
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Survey:
    """A corpus that was read once.

    Attributes:
        blocks: Its blocks, in order.
        left_out: Losses.
        sha256: Digest of every document's id and text, in order.
    """

    blocks: tuple[Surveyed, ...]
    left_out: LeftOut
    sha256: str

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(block.documents for block in self.blocks)

    @property
    def bytes(self) -> int:
        """UTF-8 size of the documents."""
        return sum(block.bytes for block in self.blocks)


def survey_in_order(
    corpus: Corpus,
    blocks: Iterable[Block],
    max_docs: int | None = None,
    max_bytes: int | None = None,
    advance: Advance = lambda documents, size: None,
) -> Survey:
    """Read a corpus up to its caps.

    Args:
        corpus: The corpus.
        blocks: Its blocks. The digest is one of all records' numbers, so it is that of the whole corpus only if the
            parts are numbered (:func:`~moefoundry.data.blocks.numbered`).
        max_docs: Stop after this many documents.
        max_bytes: Stop before the document that would exceed this many bytes of UTF-8.
        advance: Called with each document.
    """
    whole = hashlib.sha256()
    found: list[Surveyed] = []
    left_out = unusable_of(corpus)
    rest_docs, rest_bytes = max_docs, max_bytes
    for block in blocks:
        own, own_left_out = hashlib.sha256(), LeftOut()
        documents = size = 0
        full = False
        for document in corpus.documents(own_left_out.add, block.slices):
            data = document.text.encode()
            full = rest_bytes is not None and size + len(data) > rest_bytes
            if full:
                break
            documents += 1
            size += len(data)
            for digest in (whole, own):
                add_to_digest(digest, document, data)
            advance(1, len(data))
            if full := documents == rest_docs:
                break
        found.append(Surveyed(block, documents, size, own.hexdigest()))
        left_out.add_all(own_left_out, partial(name_in_file, corpus.root, block))
        if full:
            break
        rest_docs = None if rest_docs is None else rest_docs - documents
        rest_bytes = None if rest_bytes is None else rest_bytes - size
    return Survey(tuple(found), left_out, whole.hexdigest())


def survey_block(corpus: Corpus, block: Block, advance: Advance) -> tuple[Surveyed, LeftOut]:
    """Read one block; the names of what it leaves out count from its start."""
    left_out = LeftOut()
    digest = hashlib.sha256()
    documents = size = 0
    for document in corpus.documents(left_out.add, block.slices):
        data = document.text.encode()
        documents += 1
        size += len(data)
        add_to_digest(digest, document, data)
        advance(1, len(data))
    return Surveyed(block, documents, size, digest.hexdigest()), left_out


def survey_in_parallel(corpus: Corpus, blocks: Sequence[Block], left_out: LeftOut, workers: int) -> Survey:
    """Read blocks in several processes.

    Args:
        corpus: The corpus.
        blocks: Blocks of it.
        left_out: Losses to which those of the blocks are added.
        workers: Processes, as in :func:`~moefoundry.data.workers.run_jobs`.
    """
    found: list[tuple[Surveyed, LeftOut]] = []
    with Progress("reading") as progress:
        run_jobs(partial(survey_block, corpus), blocks, workers, progress.update, found.append)
    found.sort(key=lambda item: item[0].block.number)
    for surveyed, own in found:
        left_out.add_all(own, partial(name_in_file, corpus.root, surveyed.block))
    read = tuple(surveyed for surveyed, _ in found)
    return Survey(read, left_out, digest_of(read))


def digest_of(blocks: Iterable[Surveyed]) -> str:
    """Compute the SHA-256, in hex, of the digests of blocks."""
    return digest_of_digests((block.documents, block.sha256) for block in blocks)


def digest_of_digests(blocks: Iterable[tuple[int, str]]) -> str:
    """Compute the same from the number of documents and the digest of each block."""
    return hashlib.sha256("".join(f"{documents} {sha256}\n" for documents, sha256 in blocks).encode()).hexdigest()


def unusable_of(corpus: Corpus) -> LeftOut:
    """Collect the entries of a corpus that are no readable files."""
    left_out = LeftOut()
    for item in corpus.unusable:
        left_out.add(*item)
    return left_out


def documents_of(corpus: Corpus, surveyed: Surveyed, advance: Advance) -> Iterator[Document]:
    """Yield the documents of a block as they were surveyed.

    Raises:
        UserError: They have changed since.
    """
    digest = hashlib.sha256()
    for document in islice(corpus.documents(parts=surveyed.block.slices), surveyed.documents):
        data = document.text.encode()
        add_to_digest(digest, document, data)
        yield document
        advance(1, len(data))
    if digest.hexdigest() != surveyed.sha256:
        raise UserError(f"{corpus.root}: changed while it was read; prepare it when nothing writes to it")
