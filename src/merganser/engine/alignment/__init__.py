"""Match the tensors of the inputs: which of them make each tensor of the output, and whether a model can load it."""
