"""How fast, and how right, methods that decompose matrices are, beside FusionBench on the same matrices."""
