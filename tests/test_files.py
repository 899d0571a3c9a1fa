"""Files and folders that appear whole or not at all, whoever is killed while they are written."""

import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.files import (
    LEFT,
    cache_folder,
    check_place,
    check_target,
    remove_left,
    whole_file,
    whole_folder,
    write_text,
)
from lingen.recipe.errors import RecipeError

SPAWN = multiprocessing.get_context("spawn")
PAGE = 1 << 16


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _write_again_and_again(path: Path, letter: bytes, rounds: int) -> None:
    for _ in range(rounds):
        with whole_file(path) as partial, partial.open("wb") as file:
            for _ in range(8):
                file.write(letter * PAGE)
                file.flush()


def test_two_processes_at_one_file_do_not_mix(tmp_path: Path):
    path = tmp_path / "file"
    writers = [SPAWN.Process(target=_write_again_and_again, args=(path, letter, 30)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen | {path.read_bytes()} <= {b"a" * 8 * PAGE, b"b" * 8 * PAGE}
    assert _names(tmp_path) == ["file"]


def _write_and_wait(path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text("half")
        time.sleep(60)


def _fill_and_wait(path: Path) -> None:
    with whole_folder(path) as work:
        (work / "half").touch()
        time.sleep(60)


def _kill(process: multiprocessing.process.BaseProcess, number: int, begun) -> int | None:
    process.start()
    deadline = time.monotonic() + 30
    while not begun() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert begun()
    os.kill(process.pid, number)
    process.join(30)
    return process.exitcode


def test_a_killed_process_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    process = SPAWN.Process(target=_write_and_wait, args=(path,))
    begun = lambda: any(one.read_text() == "half" for one in tmp_path.glob("file.*.partial"))  # noqa: E731
    assert _kill(process, signal.SIGKILL, begun) == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # what the killed one left is in nobody's way
    assert path.read_text() == "new"
    (left,) = tmp_path.glob("*.partial")
    remove_left(tmp_path, "*.partial")
    assert left.exists()  # it may still be written to
    os.utime(left, (time.time() - LEFT - 1,) * 2)
    remove_left(tmp_path, "*.partial")
    assert _names(tmp_path) == ["file"]


def test_a_killed_process_leaves_no_folder(tmp_path: Path):
    path = tmp_path / "folder"
    process = SPAWN.Process(target=_fill_and_wait, args=(path,))
    assert _kill(process, signal.SIGKILL, lambda: any(tmp_path.glob("*/half"))) == -signal.SIGKILL
    assert not path.exists()
    (left,) = tmp_path.iterdir()
    os.utime(left, (time.time() - LEFT - 1,) * 2)
    with whole_folder(path) as work:
        (work / "whole").touch()
    assert _names(tmp_path) == ["folder"] and _names(path) == ["whole"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: BaseException):
    path, folder = tmp_path / "file", tmp_path / "folder"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as partial:
        partial.write_text("half")
        raise error
    with pytest.raises(type(error)), whole_folder(folder) as work:
        (work / "half").touch()
        raise error
    assert _names(tmp_path) == ["file"] and path.read_text() == "old"


def test_a_file_that_cannot_take_its_place_is_not_left_either(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "there", "text")
    assert _names(tmp_path) == ["there"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError), whole_folder(tmp_path / "file"):
        pass
    assert _names(tmp_path) == ["file", "there"]


def test_of_two_that_build_a_folder_the_first_one_stays(tmp_path: Path):
    path = tmp_path / "around" / "folder"
    with whole_folder(path) as late:
        (late / "late").touch()
        with whole_folder(path) as early:
            (early / "early").touch()
    assert _names(path) == ["early"] and _names(path.parent) == ["folder"]


def test_a_folder_of_ones_own_is_not_anothers(tmp_path: Path):
    path = tmp_path / "folder"
    with pytest.raises(RecipeError, match="folder was made by another process meanwhile. Name another"):
        with whole_folder(path, own=True) as late:
            (late / "late").touch()
            with whole_folder(path, own=True) as early:
                (early / "early").touch()
    assert _names(path) == ["early"] and _names(tmp_path) == ["folder"]


def test_modes_are_what_the_umask_says(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "folder": 0o750}


def test_what_cannot_be_written_is_said_before(tmp_path: Path):
    for name in ("clip.mp4", "clip.MP4"):
        assert check_target(tmp_path / "new" / name, ".mp4") == tmp_path / "new" / "clip.mp4"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "clip.avi", "does not end with .mp4"),
        (tmp_path / "file" / "clip.mp4", "is a file, not a folder"),
    ):
        with pytest.raises(RecipeError, match=says):
            check_target(path, ".mp4")
    check_place(tmp_path / "new" / "newer")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGEN_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("LINGEN_CACHE")
    assert cache_folder() == Path("/elsewhere/lingen")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lingen"


def test_a_place_that_rights_alone_would_allow_is_refused(tmp_path: Path):
    """Root may write into /proc, says the system, and then it takes no file."""
    for path in (Path("/proc/x.mp4"), Path("/proc/x/y.mp4")):
        with pytest.raises(RecipeError, match="Nothing can be written into /proc"):
            check_target(path, ".mp4")
    assert check_target(tmp_path / "new" / "x.mp4", ".mp4") == tmp_path / "new" / "x.mp4"
    assert not [*tmp_path.iterdir()]


def test_sample_refuses_such_a_place_before_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sample", "--run", str(tmp_path), "--prompt", "x", "--out", "/proc/x.mp4"]) == 2
    assert "Nothing can be written into /proc" in capsys.readouterr().err
