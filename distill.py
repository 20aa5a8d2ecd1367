"""Static distillation: `python distill.py kd=dkd teacher=resnet56 student=resnet20`; `--help` says more."""

import sys

from cil.cli import main

if __name__ == "__main__":
    sys.exit(main(program="distill.py", config_name="distill"))
