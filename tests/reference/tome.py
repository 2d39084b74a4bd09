"""Bolya et al. 2023, "Token merging: your ViT but faster", section 3: bipartite soft matching, one image, float64."""

from .kv_scores import cosine


def tome(metric, r, class_token):
    """Pairs (token that goes, token that it goes into)."""
    pairs = []
    for a in range(2 if class_token else 0, len(metric), 2):
        b = max(range(1, len(metric), 2), key=lambda b: cosine(metric[a], metric[b]))
        pairs.append((cosine(metric[a], metric[b]), a, b))
    return {(a, b) for _, a, b in sorted(pairs, reverse=True)[:r]}


def merged(tokens, sizes, pairs):
    """Means of the tokens, weighted with their sizes, and the sizes of the means."""
    gone = {a for a, _ in pairs}
    result = []
    for b in range(len(tokens)):
        if b not in gone:
            group = [b, *(a for a, into in pairs if into == b)]
            size = sum(sizes[t] for t in group)
            result.append((sum(sizes[t] * tokens[t] for t in group) / size, size))
    return result
