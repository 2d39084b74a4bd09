"""Recipe and headers become a plan: how each tensor is merged, and what becomes of every tensor of the inputs."""
