"""One training at a time in a run folder: ``lock.json`` says who trains there, and a dead owner is recognised.

A lock appears by a hard link, which exactly one of many processes gets. A dead owner's lock is replaced only by who
holds the lock on that very lock (its name ends with the dead owner's mark) and finds it unchanged; so of several
claimants exactly one wins, also where one of them dies on the way. Works on network file systems, which is why no
flock is used. Times are compared with those that the file system itself gives."""

import contextlib
import errno
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingen.files import check_place, remove_left
from lingen.provenance import time_now
from lingen.recipe.errors import RecipeError

LOCK_NAME = "lock.json"
HEARTBEAT = 20.0
"""Seconds between two touches of a lock by its owner."""
SILENCE = 6 * HEARTBEAT
"""Seconds without one after which an owner that cannot be looked at counts as dead."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links."""

HIDDEN = "hidden"
Owner = dict[str, Any]
_held: list["Lock"] = []


def myself() -> Owner:
    """What a lock says of its owner."""
    return {
        "host": _host(), "pid": os.getpid(), "process_started": started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT"), "since": time_now(),
        "mark": secrets.token_hex(8),
    }  # fmt: skip


def _host() -> str:
    """The machine and, where process numbers count by container, the container."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process of this machine was started, as a text to compare: numbers are given again. None: no process;
    `HIDDEN`: another user's, of which nothing is shown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else f"{boot} {rest[18]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return HIDDEN
    told = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return told.stdout.strip() or HIDDEN


def death_of(owner: Owner, silent: float) -> str | None:
    """Why the owner of a lock counts as dead; None where it may be alive.

    Args:
        silent: seconds since the lock was touched."""
    if owner.get("host") == _host() and "pid" in owner:
        alive = started(int(owner["pid"])) in (HIDDEN, owner.get("process_started"))
        return None if alive else f"process {owner.get('pid')} of {_place(owner)} has ended"
    job = os.environ.get("SLURM_JOB_ID")
    if job and owner.get("job") == job and owner.get("restart") != os.environ.get("SLURM_RESTART_COUNT"):
        return f"job {job} was requeued"
    return f"{_place(owner)} has given no sign for {silent:.0f} s" if silent > SILENCE else None


def _place(owner: Owner) -> str:
    return str(owner.get("host", "an unknown machine")).partition(" ")[0]


def owner_of(folder: Path) -> tuple[Owner, float] | None:
    """Who holds the lock of a folder, and for how many seconds he has not touched it; None: nobody that can be read."""
    lock = folder / LOCK_NAME
    try:
        owner, silent = _read(lock), max(0.0, time.time() - lock.stat().st_mtime)
    except OSError:
        return None
    return (owner, silent) if owner is not None else None


def check_unlocked(folder: Path) -> None:
    """RecipeError where a living process trains in a folder. Writes nothing."""
    held = owner_of(folder)
    if held is not None and held[0].get("host") == _host() and death_of(*held) is None:
        raise _refusal(folder / LOCK_NAME, *held)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator["Lock"]:
    """Locks a folder, which is made. RecipeError: another process trains there, or nothing can be written."""
    check_place(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / LOCK_NAME)
        lock.take()
        remove_left(folder, f"{LOCK_NAME}.*")
    except OSError as error:
        raise RecipeError(f"Nothing can be written into {folder} ({error.strerror}). Name another one.") from error
    threading.Thread(target=lock.beat, name="lingen-lock", daemon=True).start()
    _held.append(lock)
    try:
        yield lock
    finally:
        _held.remove(lock)
        lock.release()


def check_held(*, look: bool = False) -> None:
    """RecipeError where another process has taken over a folder that this one trains in, because it seemed to be dead.

    Args:
        look: into the folder; else what was found within the last `HEARTBEAT` counts."""
    for lock in _held:
        with contextlib.suppress(OSError):
            if look:
                lock.look()
        if lock.thief is not None:
            raise RecipeError(
                f"{lock.path}: process {lock.thief.get('pid')} on {_place(lock.thief)} has taken this run over, "
                f"because this one gave no sign for more than {SILENCE:.0f} s. Nothing more is written here."
            )


class Lock:
    """A file that one process holds.

    Args:
        path: of the lock."""

    def __init__(self, path: Path):
        self.path = path
        self.owner = myself()
        self.was: str | None = None
        """Why the owner before counts as dead, where there was one."""
        self.thief: Owner | None = None
        """Who took it over meanwhile."""
        self._over = threading.Event()

    def take(self) -> None:
        """RecipeError where a living process holds it."""
        own = self.path.with_name(f"{self.path.name}.{self.owner['mark']}.partial")
        try:
            while not (self._appear(own) or self._is_mine()):  # a network file system may tell of a link's failure late
                self._replace_dead(own)
                if self._is_mine():
                    return
        finally:
            own.unlink(missing_ok=True)

    def _appear(self, own: Path) -> bool:
        """Writes the lock anew; False where it exists."""
        own.write_text(json.dumps(self.owner, indent=2), encoding="utf-8")
        try:
            os.link(own, self.path)
        except (FileExistsError, FileNotFoundError):  # the winner may have cleared this one's own file away
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    json.dump(self.owner, file, indent=2)
            except FileExistsError:
                return False
        return True

    def _replace_dead(self, own: Path) -> None:
        """Puts this process's lock in the place of a dead owner's, unless that has changed meanwhile."""
        try:
            owner, silent = _read(self.path), own.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:  # it was let go, or a winner has cleared this one's own file away: try again
            return
        why = death_of(owner or {}, silent)
        if why is None:
            raise _refusal(self.path, owner or {}, silent)
        with self._claimed(owner), contextlib.suppress(FileNotFoundError):  # cleared away meanwhile: try again
            if _read(self.path) == owner:
                own.replace(self.path)
                self.was = why

    @contextlib.contextmanager
    def _claimed(self, owner: Owner | None) -> Iterator[None]:
        """Holds the right to replace or remove this owner's lock."""
        claim = Lock(self.path.with_name(f"{LOCK_NAME}.{(owner or {}).get('mark', 'unreadable')}"))
        claim.take()
        try:
            yield
        finally:
            claim.path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        try:
            return _read(self.path) == self.owner
        except FileNotFoundError:
            return False

    def beat(self) -> None:
        """Touches the lock until it is released or another process has it."""
        while self.thief is None and not self._over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)
                self.look()

    def look(self) -> None:
        """Finds out whether another process has it."""
        owner = _read(self.path)
        self.thief = owner if owner != self.owner else None

    def release(self) -> None:
        """Removes the lock, if it still is this process's."""
        self._over.set()
        with contextlib.suppress(OSError, RecipeError), self._claimed(self.owner):
            if self._is_mine():
                self.path.unlink()


def _read(path: Path) -> Owner | None:
    """What a lock says; None where it is cut or being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _refusal(lock: Path, owner: Owner, silent: float) -> RecipeError:
    job = f", job {owner['job']}" if owner.get("job") else ""
    return RecipeError(
        f"{lock.parent} is in use: process {owner.get('pid', '?')} on {_place(owner)}{job} trains there since "
        f"{owner.get('since', '?')} and gave its last sign {max(0.0, silent):.0f} s ago. Wait for its end, stop it, or "
        f"name another folder with --run. A process that has died is noticed: here at once, on another machine after "
        f"{SILENCE:.0f} s without a sign."
    )
