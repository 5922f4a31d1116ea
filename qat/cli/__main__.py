"""`python -m qat.cli` is `python train.py`."""

import sys

from qat.cli.main import main

sys.exit(main())
