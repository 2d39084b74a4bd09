"""Match the inputs' tensors: which of them are merged into each output tensor, and whether the result can be loaded."""
