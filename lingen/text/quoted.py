"""The words of a prompt that should appear as writing in the picture."""

import re

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
