"""The quick tests under other Pythons: ``python -m tests.tools.pythons [3.12 3.13 ...]``. Each gets a virtual
environment of its own in a temporary folder; a version that this machine lacks is named as untried."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def interpreter_of(version: str) -> str | None:
    """Where `pythonX.Y` is and says that it is that version; a launcher of pyenv's may be there without it."""
    path = shutil.which(f"python{version}")
    if path is None:
        return None
    asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return path if done.stdout.strip() == version else None


def try_version(python: str) -> str:
    """``passed``, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "bin" / "python"
        steps = {
            "no virtual environment": [python, "-m", "venv", folder],
            "does not install": [str(own), "-m", "pip", "install", "--quiet", f"{ROOT}[test]"],
            "tests fail": [str(own), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests"],
        }
        for wrong, words in steps.items():
            if subprocess.run(words, cwd=ROOT, check=False).returncode:
                return wrong
    return "passed"


def main(versions: list[str]) -> int:
    found = {version: interpreter_of(version) for version in versions or VERSIONS}
    told = {
        version: try_version(python) if python else "untried: not on this machine" for version, python in found.items()
    }
    print(*(f"Python {version}: {one}" for version, one in told.items()), sep="\n")
    return int(any(not one.startswith(("passed", "untried")) for one in told.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
