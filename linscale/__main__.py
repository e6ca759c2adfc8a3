"""`python -m linscale`, the same as the `linscale` command."""

import sys

from linscale.cli import main

if __name__ == "__main__":  # data workers are spawned and import this file again
    sys.exit(main())
