"""The ``lingen`` command, also as ``python -m lingen``."""

import faulthandler
import gc
import sys

from lingen.ranks import signals


def enter() -> int:
    """Runs the command of ``sys.argv``; returns its exit code. ``fit`` listens to signals before anything else."""
    faulthandler.enable()  # a crash of a kernel or a driver tells where it was
    gc.set_threshold(50_000)  # imports make many objects and no garbage: looking for some took a fifth of their time
    if sys.argv[1:2] == ["fit"]:
        signals.listen()
    try:
        from lingen.cli import main
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return signals.INTERRUPTED
    return main()


if __name__ == "__main__":
    sys.exit(enter())
