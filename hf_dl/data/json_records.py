"""Read a large JSON file with a list of objects, without holding the file in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

_BLANK = re.compile(r"[ \t\r\n]*")
_LONGEST = 2**26  # characters of the longest object


def stream_records(path: Path, *, chunk: int = 2**20) -> Iterator[dict]:
    """Read a JSON file with a list of objects, piece by piece.

    Args:
        path: The file.
        chunk: Number of characters that are read at once. Longer objects are fine.

    Yields:
        The objects.

    Raises:
        ValueError: If the file is not a list of objects, is damaged, or ends too early.
    """
    decoder, text, place = json.JSONDecoder(), "", 0

    def problem(reason: str) -> ValueError:
        return ValueError(f"{path} {reason}. Expected a JSON list of objects. Copy the file again.")

    with open(path, encoding="utf-8-sig") as file:

        def read_more(count: int) -> bool:
            nonlocal text, place
            try:
                piece = file.read(count)
            except UnicodeDecodeError as error:
                raise problem(f"is not UTF-8 text ({error})") from None
            text, place = text[place:] + piece, 0
            return bool(piece)

        def next_mark(expected: str) -> str:
            """Return the next character after white space, or "" at the end of the file."""
            nonlocal place
            place = _BLANK.match(text, place).end()
            while place == len(text) and read_more(chunk):
                place = _BLANK.match(text).end()
            mark = text[place : place + 1]
            if mark not in expected or bool(mark) != bool(expected):
                raise problem(f"has {mark!r} in a wrong place" if mark else "ends too early")
            return mark

        next_mark("[")
        place += 1
        mark = next_mark("{]")
        while mark != "]":
            try:
                record, place = decoder.raw_decode(text, place)
            except ValueError as error:  # the rest of the object may be in the next piece
                length = len(text) - place
                if length > _LONGEST or not read_more(max(chunk, length)):
                    raise problem(f"is damaged or ends too early ({error})") from None
                continue
            yield record
            mark = next_mark(",]")
            if mark == ",":
                place += 1
                next_mark("{")
        place += 1
        next_mark("")
