"""Tang et al. 2024, "RazorAttention", section 3.3: attention with a compensation token; one query, one head, float64."""

import math


def razor_attention(query, keys, values, scaling, *, sinks, recent):
    """The output of a head that is not a retrieval head, whose cache holds `recent` last tokens beside the sinks."""
    length = len(keys)
    near = [*range(sinks), *range(length - recent, length)]
    far = range(sinks, length - recent)
    mass = [math.exp(scaling * float(query @ keys[t])) for t in near]
    output = sum(m * values[t] for m, t in zip(mass, near, strict=True))
    key, value = sum(keys[t] for t in far) / len(far), sum(values[t] for t in far) / len(far)
    own = len(far) * math.exp(scaling * float(query @ key))
    return (output + own * value) / (sum(mass) + own)
