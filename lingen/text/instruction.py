"""The instruction for a chat model, how its answer is cleaned, and the words of a prompt that should appear as writing.
The paper does not give its own: all is ours. Pure functions of text."""

import re
from importlib.resources import files

INSTRUCTION_VERSION = 1
"""Raised with every change of `INSTRUCTION` or `clean`, so that cached texts of older versions are not used."""

INSTRUCTION = files("lingen.text").joinpath("instruction.txt").read_text(encoding="utf-8")

PAIRS = {'"': '"', "“": "”", "«": "»", "'": "'", "‘": "’"}
BEFORE = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay)(?: thing)?\s*[!.,:]\s*)?"  # "Sure!"
    r"(?:here(?: is|'s|’s)\b[^\n:.]{0,100}:"  # "Here is the prompt:"
    r"|(?:(?:the|your) )?(?:\w+ ){0,2}(?:prompt|description|paragraph):)?\s*",  # "Rewritten prompt:"
    re.IGNORECASE,
)
AFTER = re.compile(
    r"\n\s*\W?(?:note\b|let me know|i hope|please let|feel free|word count).*\Z", re.IGNORECASE | re.DOTALL
)


def question(prompt: str) -> str:
    """The message for the chat model."""
    return f"{INSTRUCTION}\nThe user wants to see: {prompt}"


def clean(answer: str) -> str:
    """The description alone, as one paragraph: without thoughts, introduction, closing remark, markup, and quotation
    marks around it. Empty where nothing else is there."""
    text = re.sub(r"\A.*</think>", "", answer, flags=re.DOTALL)
    text = re.sub(r"(?m)^#{1,6}\s.*$", "", text)
    text = re.sub(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+", "", text)
    text = re.sub(r"(\*\*|__)(.+?)\1", r"\2", text, flags=re.DOTALL)
    text = BEFORE.sub("", AFTER.sub("", text.strip()))
    return _unwrapped(" ".join(text.split()))


def _unwrapped(text: str) -> str:
    """The text without quotation marks around all of it; marks of quotations inside it stay."""
    if len(text) < 2 or PAIRS.get(text[0]) != text[-1]:
        return text
    inner = text[1:-1]
    marks = re.finditer(rf"(?<!\w)[{text[0]}{text[-1]}]|[{text[0]}{text[-1]}](?!\w)", inner)  # but no apostrophes
    first = next(marks, None)
    if first and first.start() and not re.match(r"[\s(]", inner[first.start() - 1]):
        return text  # this mark closes a quotation that the first letter opened
    return inner.strip()


def fault_of(prompt: str, text: str, ended: bool, max_tokens: int) -> str | None:
    """A sentence for why a rewritten prompt cannot be used; None where it can.

    Args:
        prompt: the user's.
        text: what `clean` gave.
        ended: whether the model stopped before `max_tokens`."""
    if not ended:
        return f"It has not come to an end after {max_tokens} tokens."
    if not text:
        return "It is empty."
    kept = quoted(text).splitlines()
    lost = [one for one in quoted(" ".join(prompt.split())).splitlines() if one not in kept]
    if lost:
        told = ", ".join(f'"{one}"' for one in dict.fromkeys(lost))
        return f"It does not repeat in quotation marks, letter by letter: {told}."
    return None


_PARTS = re.compile(
    r"""
      (?<!\d)" ([^"]+) "                        # not 7" by 5", which are inches
    | “ ([^“”]+) ” | „ ([^„“”]+) [“”] | « ([^«»]+) » | 「 ([^「」]+) 」
    | (?<!\w)' (?=\S) ([^"]+?) (?<=\S) ' (?!\w)  # not the apostrophes of don't and the dogs' bowls
    | (?<!\w)‘ (?=\S) ([^‘]+?) (?<=\S) ’ (?!\w)
    """,
    re.VERBOSE,
)


def quoted(prompt: str) -> str:
    """What stands in quotes, part after part, one on each line; empty where nothing does. Movie Gen (section 3.1.4)
    reads only this with ByT5, for text to be rendered; how parts are told and joined is ours."""
    return "\n".join(part.strip() for found in _PARTS.findall(prompt) for part in found if part.strip())
