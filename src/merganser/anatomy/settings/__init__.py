"""The settings of a config.json, without the tensors: what they mean, what they change, and how they follow a choice of layers."""
