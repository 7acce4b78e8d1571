"""`python -m ardlora_ext`."""

import sys

from ardlora_ext.cli import main

sys.exit(main())
