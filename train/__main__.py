"""`python -m train` is the `zoo` command."""

import sys

from train.cli import main

sys.exit(main())
