"""File formats of tensors: one file per format."""
