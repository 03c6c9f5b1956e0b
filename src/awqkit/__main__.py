"""`python -m awqkit` is the command `awqkit`."""

import sys

from awqkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
