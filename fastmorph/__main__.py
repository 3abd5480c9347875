"""`python -m fastmorph` is the command `fastmorph`."""

import sys

from fastmorph.cli import main

sys.exit(main())
