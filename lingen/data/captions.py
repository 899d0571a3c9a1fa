"""The captions inside a sample: never its file name, and never made up."""

from collections.abc import Mapping
from typing import Any

from lingen.recipe.text import NoText, decode_json, decode_text

NO_CAPTION = "no caption"


def captions_of(sample: dict[str, bytes]) -> list[str]:
    """`captions` (a list) or `caption` of the JSON, else the text of the .txt; at least one, each once. ValueError:
    ``no caption`` (none, or one of them empty), ``broken JSON``, ``caption is not UTF-8``."""
    try:
        about = json_of(sample)
        found = about.get("captions") or about.get("caption")
        if found is None and "txt" in sample:
            found = decode_text(sample["txt"])
        return clean_captions([] if found is None else found)
    except NoText as error:
        raise ValueError(f"caption is not UTF-8: {error}") from error
    except UnicodeError as error:  # half of a pair of surrogates, which JSON can hold
        raise ValueError("caption is not UTF-8: it holds half of a surrogate pair") from error


def json_of(sample: Mapping[str, bytes]) -> dict[str, Any]:
    """What a sample's JSON says of it; nothing where there is none, or no mapping in it. ValueError ``broken JSON``."""
    about = decode_json(sample["json"]) if "json" in sample else None
    return about if isinstance(about, dict) else {}


def clean_captions(found: Any) -> list[str]:
    """One caption or several, stripped, each once. Errors as for `captions_of`."""
    given = found if isinstance(found, list) else [found]
    captions = [text.strip() if isinstance(text, str) else "" for text in given]
    "".join(captions).encode()  # JSON can hold one half of a surrogate pair, which is no text
    if not captions:
        raise ValueError(NO_CAPTION)
    if not all(captions):
        raise ValueError(f"{NO_CAPTION}: it is empty, or no text")
    return list(dict.fromkeys(captions))
