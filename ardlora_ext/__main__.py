"""`python -m ardlora_ext`."""

import sys

from ardlora_ext.commands.cli import main

sys.exit(main())
