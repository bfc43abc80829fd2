"""python -m krrst_fast: the `krrst` command."""

import sys

from krrst_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
