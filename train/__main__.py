"""`python -m train` and `torchrun -m train` are the `zoo` command."""

import sys

from train.cli import main

sys.exit(main())
