"""`python -m gmpo.cli`, for launchers that start modules (torchrun -m, accelerate launch -m)."""

import sys

from gmpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
