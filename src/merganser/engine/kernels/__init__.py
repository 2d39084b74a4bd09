"""Run a merge method on the blocks of one tensor: blocks, kernels, measuring, solving, combining."""
