"""`python -m awqkit` is the command `awqkit`."""

import sys

from awqkit.cli.main import command

if __name__ == "__main__":
    sys.exit(command())
