"""`python -m qat.cli` is `python train.py`."""

import sys

from qat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
