"""`optplan` and `python -m optplan`."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line and exit with its status: 0 done, 1 a negative answer or our fault, 2 bad input."""
    gc.disable()  # the process is short-lived, and looking for garbage would take a tenth of its time
    try:
        from optplan.app import app
        from optplan.boundary import run

        status = run(app)
    except KeyboardInterrupt:
        # Interrupted while still loading: the boundary is not there yet.
        print("optplan: interrupted", file=sys.stderr)
        status = 130
    gc.freeze()  # the interpreter would look once more on its way out
    sys.exit(status)


if __name__ == "__main__":
    main()
