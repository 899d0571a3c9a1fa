"""What the tests read back of media that lingen wrote."""

import json
from pathlib import Path
from typing import Any

import av


def read_about(path: Path) -> tuple[str, dict[str, Any]]:
    """The title and the JSON that `save_video` stored in an MP4."""
    with av.open(str(path)) as file:
        return file.metadata.get("title", ""), json.loads(file.metadata["comment"])
