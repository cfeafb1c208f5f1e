"""`python -m lorax` is `lorax`."""

import sys

from lorax.cli import main

if __name__ == "__main__":
    sys.exit(main())
