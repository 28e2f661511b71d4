"""`python -m megaroute` is the `megaroute` command."""

import sys

from megaroute.cli import main

sys.exit(main())
