"""Gradients of a model's loss on text, with one transformer block in memory at a time: exact reverse mode.

The forward keeps the outputs of all blocks on disk. Then the blocks are visited from the last to the first: each is
loaded again and recomputed under autograd, sequence by sequence, and hands the gradient of what it received on to the
block before it. So the whole data set takes two reads of the model.
"""

from .loss import Loss
from .run import GRADIENTS, LOSS_FILE, Reverse, check_predicts

__all__ = ["GRADIENTS", "LOSS_FILE", "Loss", "Reverse", "check_predicts"]
