import sys

import torch

from tests.parity.runner import main

torch.set_num_threads(1)  # the arrays are small: threads would wait for each other longer than they compute
sys.exit(main())
