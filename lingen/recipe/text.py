"""Text and JSON that a user wrote, whatever editor saved it: with or without a byte order mark."""

import codecs
import json
from pathlib import Path
from typing import Any

from lingen.recipe.errors import RecipeError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with whose mark it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks (Unicode 16, section 23.8), and the encodings that they stand for."""


class NoText(ValueError):
    """Bytes that are no text; the message says where, and the cure."""


def decode_text(data: bytes) -> str:
    """The text without its byte order mark, with ``\\n`` for every end of a line; without a mark it is UTF-8.

    Raises:
        NoText: the bytes are no such text."""
    mark, encoding = next((one for one in MARKS if data.startswith(one[0])), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].decode(encoding, "replace").count("\n")
        raise NoText(
            f"line {line}, byte {len(mark) + error.start} ({error.object[error.start]:#04x}) is no {encoding.upper()}; "
            "save the file as UTF-8"
        ) from error


def decode_json(data: bytes) -> Any:
    """The value of a JSON file. NoText, or ValueError ``broken JSON: ...``, where there is none."""
    text = decode_text(data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ValueError(f"broken JSON: {error}") from error


def read_text_file(path: Path) -> str:
    """The text of a file, as `decode_text` gives it. RecipeError, naming the file, where it cannot be read."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except NoText as error:
        raise RecipeError(f"'{path}' is not UTF-8: {error}.") from error
