"""Files damaged by chance go through the command line: it has to name them, and never shows a traceback.

Each case is a pure function of the seed and its number. It runs in a process of its own kind (a pool's worker), since a
decoder may end its process; what does so is a failure, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from lingen.prepare.workers import in_order
from tests.soak.damage import damaged, damaged_json, damaged_yaml

DOCUMENTED = {0, 1, 2}
"""Exit codes of a command that no signal stops (docs/architecture.md)."""
SECONDS = 120
"""After which a case counts as one that does not end."""
RECIPE: dict[str, Any] = {
    "extends": "footage_64",
    "data": {
        "frames": 8, "size": [32, 32], "fps": 8, "mix": {"image": 1, "video": 1}, "shards": {"image": "nowhere.tar"}
    },
    "sample": {"steps": 2},
}  # fmt: skip
OFF = [word for name in ("still", "jerky", "frozen", "duplicates", "black", "min-fps") for word in (f"--{name}", "off")]


class Trial(NamedTuple):
    """A case that is ready to run, in its folder."""

    words: list[str]
    """Of the command line."""
    names: tuple[str, ...]
    """One of these has to stand in what a command that fails says."""


class Failure(NamedTuple):
    """A case that went wrong, and the files that it was made of."""

    case: int
    target: str
    reason: str
    files: dict[str, bytes]

    def __str__(self) -> str:
        return f"case {self.case} ({self.target}): {self.reason}"


class FuzzReport(NamedTuple):
    """What was tried, and what went wrong."""

    counts: Counter[str]
    failures: list[Failure]


class Case(NamedTuple):
    """One case, for a worker."""

    seed: int
    number: int
    only: str | None

    @property
    def rng(self) -> Random:
        return Random(f"{self.seed} {self.number}")

    @property
    def target(self) -> str:
        return self.only or sorted(TARGETS)[self.number % len(TARGETS)]


def fuzz(seed: int, seconds: float, *, only: str | None = None, case: int | None = None) -> FuzzReport:
    """Runs cases until the time is over, or one case."""
    end = time.monotonic() + seconds
    report = FuzzReport(Counter(), [])

    def cases() -> Iterator[Case]:
        number = 0 if case is None else case
        while case is None and time.monotonic() < end or number == case:
            yield Case(seed, number, only)
            number += 1

    for one, failure in in_order(run_case, cases(), 1, _crashed):
        report.counts[one.target] += 1
        if failure is not None:
            report.failures.append(failure)
    return report


def _crashed(case: Case) -> Failure:
    with tempfile.TemporaryDirectory() as folder:
        TARGETS[case.target](Path(folder), case.rng)
        return Failure(case.number, case.target, "it ended its process", _contents(Path(folder)))


def run_case(case: Case) -> Failure | None:
    """Builds the files of a case and runs its command in this process; None where all went well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LINGEN_CACHE"] = str(folder / ".cache")
        trial = TARGETS[case.target](folder, case.rng)
        files = _contents(folder)
        reason = _judge(trial, folder)
        return None if reason is None else Failure(case.number, case.target, f"{reason}\n  {trial.words}", files)


def _judge(trial: Trial, folder: Path) -> str | None:
    from lingen.cli import main

    out, here = io.StringIO(), os.getcwd()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(trial.words)
    except BaseException:  # whatever gets through is what is looked for
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        os.chdir(here)
    told = out.getvalue()
    if code not in DOCUMENTED:
        return f"exit code {code}: {told}"
    if "Traceback" in told:
        return told
    if code and not any(name in told for name in trial.names):
        return f"exit code {code} without the file's name: {told}"
    return None


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# what is damaged


@cache
def film(ending: str) -> bytes:
    """A second of a test picture."""
    from tests.helpers.footage import frames, write_film

    codecs = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4", "gif": "gif", "ts": "mpeg2video", "flv": "flv1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{ending}")
        layout = "rgb8" if ending == "gif" else "yuv420p"
        return write_film(path, frames("testsrc2", 1.1, 24, (48, 64)), 24, codecs[ending], layout).read_bytes()


@cache
def picture(ending: str) -> bytes:
    """A small gradient."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _pack(folder: Path, kind: str, *more: str) -> list[str]:
    (folder / "r.yaml").write_text(json.dumps(RECIPE))
    words = ["data", "pack", "--recipe", "r.yaml", f"--{kind}s", "in", "--out", "out", "--processes", "0", *OFF]
    return [*words, "--min-side", "off", *more]


def _film(folder: Path, rng: Random) -> Trial:
    ending = rng.choice(("mp4", "mp4", "webm", "avi", "gif", "ts", "flv", "wav"))
    source = film("mp4") if ending == "wav" else film(ending)
    (folder / "in").mkdir()
    (folder / "in" / f"x.{'mp4' if ending == 'wav' else ending}").write_bytes(damaged(source, rng))
    (folder / "in" / "x.txt").write_text("a test")
    return Trial(_pack(folder, "video"), ("x:", "x-0000"))


def _picture(folder: Path, rng: Random) -> Trial:
    ending = rng.choice(("png", "jpg", "webp", "gif", "bmp", "tif"))
    (folder / "in").mkdir()
    (folder / "in" / f"x.{ending}").write_bytes(damaged(picture(ending), rng))
    (folder / "in" / "x.txt").write_text("a test")
    return Trial(_pack(folder, "image"), ("x:",))


def _caption(folder: Path, rng: Random) -> Trial:
    (folder / "in").mkdir()
    (folder / "in" / "x.png").write_bytes(picture("png"))
    about = {"caption": "a test", "captions": ["a", "b"], "more": {"x": [1, 2.5, None]}}
    as_text = rng.random() < 0.3
    content = damaged("a caption, \u00fc\n".encode(), rng) if as_text else damaged_json(about, rng)
    (folder / "in" / ("x.txt" if as_text else "x.json")).write_bytes(content)
    return Trial(_pack(folder, "image"), ("x:",))


def _table(folder: Path, rng: Random) -> Trial:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "in").mkdir()
    (folder / "in" / "x.png").write_bytes(picture("png"))
    rows: list[dict[str, Any]] = [{"key": "x", "caption": "a test; one, more"}, {"key": "y.mp4", "caption": '"\u00fc"'}]
    ending = rng.choice(("csv", "tsv", "json", "jsonl", "parquet"))
    table = folder / f"t.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
        content = damaged(table.read_bytes(), rng)
    elif ending == "json":
        content = damaged_json({row["key"]: row["caption"] for row in rows}, rng)
    elif ending == "jsonl":
        content = b"\n".join(damaged_json(row, rng) for row in rows)
    else:
        mark = rng.choice(",;\t")
        content = damaged(
            "\r\n".join(mark.join(row) for row in [list(rows[0]), *map(list, (r.values() for r in rows))]).encode(), rng
        )
    table.write_bytes(content)
    return Trial(_pack(folder, "image", "--captions", table.name), ("x:", table.name))


def _tar(folder: Path, rng: Random) -> Trial:
    (folder / "set").mkdir()
    members = {"a.png": picture("png"), "a.txt": b"one", "b.mp4": film("mp4"), "b.json": b'{"caption": "two"}'}
    members |= {"c.webp": picture("webp"), "c.json": damaged_json({"captions": ["a", "b"]}, rng)}
    if rng.random() < 0.3:
        members["d.latents.npy"] = rng.randbytes(200)
        members["d.json"] = damaged_json({"captions": ["a"], "tokens": {"0": [3]}, "null": {"0": 1}}, rng)
    content = tar_of(members)
    (folder / "set" / "a.tar").write_bytes(damaged(content, rng) if rng.random() < 0.8 else content)
    words = rng.choice((["index"], ["check"], ["check", "--decode"], ["check", "--quick"]))
    return Trial(["data", *words, "set", "--processes", "0"], ("a.tar", "'set'"))


def _manifest(folder: Path, rng: Random) -> Trial:
    import pyarrow as pa

    from lingen.data import manifest
    from lingen.prepare.index import index_folder

    (folder / "set").mkdir()
    (folder / "set" / "a.tar").write_bytes(
        tar_of({"a.png": picture("png"), "a.txt": b"a", "b.mp4": film("mp4"), "b.txt": b"b"})
    )
    index_folder(folder / "set", 0)
    path = folder / "set" / manifest.NAME
    if rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
    else:
        table = next(manifest.batches(path)).to_pylist()
        name = rng.choice(manifest.SCHEMA.names)
        kind = manifest.SCHEMA.field(name).type
        wrong: tuple[Any, ...] = ("", "\0", "../x", "a" * 70_000) if kind == pa.string() else (0, -1, 2**24)
        rng.choice(table)[name] = rng.choice(wrong)
        rows = [manifest.Row(**row) for row in table]
        manifest.write(path, rows, manifest.About(settings=rng.choice(({}, {"a": [None]}))))
    (folder / "r.yaml").write_text(
        json.dumps({**RECIPE, "data": {**RECIPE["data"], "shards": {"video": "set", "image": "set"}}})
    )
    words = rng.choice(
        (["check", "set"], ["check", "set", "--decode"], ["stats", "set"], ["check", "set", "--recipe", "r.yaml"],
         ["check", "--recipe", "r.yaml"])
    )  # fmt: skip
    more = [] if words[0] == "stats" else ["--processes", "0"]
    return Trial(["data", *words, *more], (manifest.NAME, "a.tar", "stage "))


def _recipe(folder: Path, rng: Random) -> Trial:
    whole = {
        **RECIPE, "seed": 3, "name": "x", "train": {"steps": 3, "lr": 1e-4, "ema": 0.9, "text_drop": 0.1},
        "model": {"depth": 2, "dim": 64, "mixer": {"name": "mate", "window": [2, 2, 2]}},
        "stages": {"a": {"train": {"steps": 2}}, "b": {"data": {"size": [64, 64]}}},
        "text": [{"name": "small_text"}], "trainer": {"devices": 1}, "init": "${name}", "rewrite": {"path": "x"},
    }  # fmt: skip
    (folder / "r.yaml").write_bytes(damaged_yaml(whole, rng))
    words = rng.choice((["show", "--json"], ["show"], ["doctor"], ["data", "check"]))
    return Trial([*words, "--recipe", "r.yaml"], ("r.yaml", "data.shards.", "stage ", "missing", "etc/passwd"))


def _prompts(folder: Path, rng: Random) -> Trial:
    (folder / "p.txt").write_bytes(damaged("a red kite\r\n\r\nover \u00fc hill\n".encode(), rng))
    return Trial(["prompts", "rewrite", "p.txt", "--rewriter", "no-model"], ("p.txt", "no-model"))


def _weights(folder: Path, rng: Random) -> Trial:
    import struct

    import numpy as np
    from safetensors.numpy import save

    config = json.dumps({"recipe": {"name": "x"}, "step": 3})
    meta = {
        "recipe": rng.choice((config, "", "{", "\0")),
        "step": rng.choice(("3", "x", "")),
        "format": "lingen",
        "stage": "a",
    }
    meta.pop(rng.choice((*meta, "", "", "")), None)
    content = save({"averaged.a": np.ones((2, 3), np.float32), "raw.a": np.ones((2, 3), np.float32)}, meta)
    if rng.random() < 0.5:
        size = struct.unpack("<Q", content[:8])[0]
        header = damaged_json(json.loads(content[8 : 8 + size]), rng)
        content = struct.pack("<Q", rng.choice((len(header), len(header), 2**63, 0))) + header + content[8 + size :]
    else:
        content = damaged(content, rng)
    (folder / "w.safetensors").write_bytes(content)
    words = rng.choice((
        ["export", "w.safetensors", "--out", "o.safetensors"],
        ["sample", "--run", "w.safetensors", "--prompt", "x", "--steps", "1"],
        ["show", "--recipe", "quickstart_cpu", "init=w.safetensors"],
    ))  # fmt: skip
    return Trial(words, ("w.safetensors",))


def _run(folder: Path, rng: Random) -> Trial:
    about = {
        "recipe": "x", "fingerprint": "0" * 12, "stages": ["a", "b"], "command": ["lingen"], "started": "",
        "commit": None, "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_bytes(damaged_json(about, rng))
    (folder / "run" / "recipe.yaml").write_bytes(damaged_yaml(RECIPE, rng))
    words = rng.choice((
        ["export", "run", "--out", "o.safetensors"],
        ["sample", "--run", "run", "--prompt", "x"],
        ["fit", "--recipe", "quickstart_cpu", "--run", "run", "train.steps=1",
         "data.synthetic.clips=4", "data.synthetic.images=4"],
    ))  # fmt: skip
    return Trial(words, ("run",))


TARGETS: dict[str, Callable[[Path, Random], Trial]] = {
    "film": _film, "picture": _picture, "caption": _caption, "table": _table, "tar": _tar, "manifest": _manifest,
    "recipe": _recipe, "prompts": _prompts, "weights": _weights, "run": _run,
}  # fmt: skip
"""What is damaged -> the files of a case, and its command."""
