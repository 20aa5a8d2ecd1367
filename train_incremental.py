"""Trains a class-incremental learner: `python train_incremental.py experiment=demo`; `--help` says more."""

import sys

from cil.cli import main

if __name__ == "__main__":
    sys.exit(main())
