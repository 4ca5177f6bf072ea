"""``python -m relay``: the same as the command ``firezone-relay``."""

import sys

from relay.cli import main

sys.exit(main())
