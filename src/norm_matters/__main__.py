"""`python -m norm_matters`: the same as the command `norm-matters`."""

import sys

from norm_matters.cli import main

if __name__ == "__main__":
    sys.exit(main())
