"""``python -m lingen`` is the ``lingen`` command."""

import sys

from lingen.cli import main

if __name__ == "__main__":
    sys.exit(main())
