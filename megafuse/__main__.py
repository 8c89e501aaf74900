"""`python -m megafuse` is the console script `megafuse`."""

import sys

from megafuse.cli.main import main

sys.exit(main())
