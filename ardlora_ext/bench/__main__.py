"""`python -m ardlora_ext.bench`."""

import sys

from ardlora_ext.bench.cli import main

sys.exit(main())
