"""Li et al. 2024, "SnapKV", listing 1, with a maximum as its pooling."""

from .kv_scores import best, scores


def snapkv(keys, queries, scaling, *, budget, sinks, window, pool):
    """Indices that stay."""
    score = scores(queries, keys, scaling)
    score[-window:] = [0.0] * window
    half = pool // 2
    return best([max(score[max(0, t - half) : t + half + 1]) for t in range(len(score))], budget, sinks, window)
