"""`python -m cil experiment=tiny`: what `train_incremental.py` does, wherever the package is installed."""

import sys

from cil.cli import main

if __name__ == "__main__":
    sys.exit(main(program="-m cil"))
