"""`python -m specbeam`: the same as the console script."""

import sys

from specbeam.cli import main

sys.exit(main())
