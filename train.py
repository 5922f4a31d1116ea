"""Command line of lowbit-vit; `python train.py --help` lists the commands."""

import sys

from qat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
