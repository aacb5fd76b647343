"""`optplan` and `python -m optplan`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status: 0 done, 1 a negative answer or our fault, 2 bad input."""
    from optplan.app import app
    from optplan.boundary import run

    sys.exit(run(app))


if __name__ == "__main__":
    main()
