"""`python -m fastmorph` is the command `fastmorph`."""

import sys

from fastmorph.cli.main import main

sys.exit(main())
