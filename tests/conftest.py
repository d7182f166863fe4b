"""One torch thread for all tests: with small models a second one only costs, and beside a neighbour it costs a lot."""

import torch

torch.set_num_threads(1)
