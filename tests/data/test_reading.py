"""Text out of bytes: encodings and compressions are known by content; a bad byte costs its line."""

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow
import pytest

from moefoundry.data.reading import DAMAGES, BadBytes, NotTextError, decode, lines, open_bytes, read_head

TEXT = "first line\n\nnaïve café 漢字 🙂\r\nlast, without a break"


def decoded(data: bytes, bad_bytes: BadBytes = BadBytes.drop) -> tuple[str, list[tuple[int, int]]]:
    dropped: list[tuple[int, int]] = []
    return decode(data, bad_bytes, lambda line, size: dropped.append((line, size))), dropped


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_are_read(encoding: str) -> None:
    assert decoded(TEXT.encode(encoding)) == (TEXT, [])
    big = b"\xfe\xff" + TEXT.encode("utf-16-be")
    assert decoded(big) == (TEXT, [])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_known_without_a_mark(encoding: str) -> None:
    assert decoded("plain words\n".encode(encoding)) == ("plain words\n", [])


def test_zeros_alone_are_text_as_they_are() -> None:
    assert decoded(b"\0" * 64) == ("\0" * 64, [])
    assert decoded(b"text\n" + b"\0" * 64) == ("text\n" + "\0" * 64, [])


def test_a_bad_byte_costs_its_line() -> None:
    data = b"one\ncaf\xe9\n\xef\xbf\xbd is a character\nlast \xff"
    assert decoded(data) == ("one\n\ufffd is a character\n", [(2, 5), (4, 6)])
    assert decoded(data, BadBytes.replace) == ("one\ncaf\ufffd\n\ufffd is a character\nlast \ufffd", [])


def test_a_torn_utf_16_file_loses_its_last_line() -> None:
    assert decoded("one\ntwo".encode("utf-16")[:-1]) == ("one\n", [(2, 3)])


def test_bytes_of_something_else_are_not_text() -> None:
    with pytest.raises(NotTextError):
        decoded(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), BadBytes.replace)


@pytest.mark.parametrize("compress", [gzip.compress, zstd, bz2.compress, lzma.compress])
def test_compressions_are_known_by_content(tmp_path: Path, compress) -> None:
    file = tmp_path / "name says nothing"
    data = "".join(f"{number}: {TEXT}\n" for number in range(2000)).encode()
    file.write_bytes(compress(data))
    with open_bytes(file) as stream:
        assert stream.read() == data
    assert read_head(file) == data[:4096]
    assert b"".join(lines(file)) == data
    file.write_bytes(compress(data) + compress(b"more"))  # as when files are appended
    assert b"".join(lines(file)) == data + b"more"
    file.write_bytes(compress(data)[:-20])
    with pytest.raises(DAMAGES):
        list(lines(file))


def test_lines_of_other_encodings(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        file.write_bytes(TEXT.encode(encoding))
        assert [line.rstrip(b"\n") for line in lines(file)] == TEXT.encode().split(b"\n")
