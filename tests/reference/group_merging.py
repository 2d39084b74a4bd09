"""Tang et al. 2025, "GMSA", section 3.1: means of groups of neighbours; one row, as loops."""


def group_merging(hidden, real, size):
    """Means of each `size` tokens that are not padding."""
    tokens = [state for state, there in zip(hidden, real, strict=True) if there]
    groups = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    return [sum(group) / len(group) for group in groups]
