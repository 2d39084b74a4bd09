"""Zhong et al. 2025, "AIM", section 3.2: rounds of bipartite matching of features, one image, float64, as loops."""

from .tome import tome


def aim(features, least):
    """Features that are left, in order, and the places that each stands for."""
    groups = [[t] for t in range(len(features))]
    while len(features) > least:
        pairs = tome(features, min(len(features) - least, len(features) // 2), False)
        gone = {a for a, _ in pairs}
        left, stands = [], []
        for b in range(len(features)):
            if b not in gone:
                members = [b, *(a for a, into in pairs if into == b)]
                left.append(sum(features[t] for t in members) / len(members))
                stands.append(sorted(place for t in members for place in groups[t]))
        features, groups = left, stands
    return features, groups
