"""``python -m minivit``: the command line."""

import sys

from minivit.cli.main import main

sys.exit(main())
