"""Methods that shrink mixtures, in float64 and in loops: REAP (Lasby et al. 2025), REAM (2604.04356), M-SMoE (Li et al. 2024),
HC-SMoE (Chen et al. 2025), Sub-MoE (Li et al. 2025), MergeMoE (2510.14436).

An expert is a dict of gate, up [units, width] and down [width, units], as a checkpoint of Mixtral stores it.
"""

from itertools import permutations

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def hidden(expert, x):
    return silu(expert["gate"] @ x) * (expert["up"] @ x)


def output(expert, x):
    return expert["down"] @ hidden(expert, x)


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def scores(experts, seen):
    """REAP's saliency."""
    found = []
    for e, expert in enumerate(experts):
        own = [t for t in range(len(seen["x"])) if seen["chosen"][t, e]]
        found.append(
            np.mean([seen["gates"][t, e] * np.linalg.norm(output(expert, seen["x"][t])) for t in own]) if own else 0.0
        )
    return found


def usage(seen):
    return [int(seen["chosen"][:, e].sum()) for e in range(seen["chosen"].shape[1])]


def top(values, count):
    return sorted(sorted(range(len(values)), key=lambda e: (-values[e], e))[:count])


def join(similar, centres, experts):
    groups = {centre: [centre] for centre in centres}
    for e in range(experts):
        if e not in groups:
            groups[max(centres, key=lambda centre: similar(e, centre))].append(e)
    return [groups[centre] for centre in centres]


def average(members, weights):
    total = sum(weights)
    return {name: sum(w / total * m[name] for w, m in zip(weights, members, strict=True)) for name in members[0]}


def align(reference, expert):
    """Try every order of the hidden units."""
    best = max(
        permutations(range(len(expert["gate"]))),
        key=lambda p: (
            (reference["gate"] * expert["gate"][list(p)]).sum()
            + (reference["up"] * expert["up"][list(p)]).sum()
            + (reference["down"] * expert["down"][:, list(p)]).sum()
        ),
    )
    p = list(best)
    return {"gate": expert["gate"][p], "up": expert["up"][p], "down": expert["down"][:, p]}


def merge(experts, groups, values, *, aligned):
    found = []
    for group in groups:
        members = [experts[e] for e in group]
        if aligned:
            members = [members[0], *(align(members[0], other) for other in members[1:])]
        found.append(average(members, [values[e] for e in group]))
    return found


def mean_rows(router, groups, values):
    return np.stack([sum(values[e] * router[e] for e in g) / sum(values[e] for e in g) for g in groups])


def reap(experts, seen, router, count):
    kept = top(scores(experts, seen), count)
    return [[e] for e in kept], [experts[e] for e in kept], router[kept]


def ream(experts, seen, router, count):
    values = scores(experts, seen)
    centres = top(values, count)
    gated = [
        np.concatenate([seen["gates"][t, e] * output(expert, x) for t, x in enumerate(seen["x"])])
        for e, expert in enumerate(experts)
    ]
    logits = seen["logits"]
    groups = join(
        lambda e, c: cosine(logits[:, e], logits[:, c]) / 2 + cosine(gated[e], gated[c]) / 2, centres, len(experts)
    )
    return groups, merge(experts, groups, values, aligned=True), router[centres]


def msmoe(experts, seen, router, count):
    values, logits = usage(seen), seen["logits"]
    groups = join(lambda e, c: cosine(logits[:, e], logits[:, c]), top(values, count), len(experts))
    return groups, merge(experts, groups, values, aligned=True), mean_rows(router, groups, values)


def hc_smoe(experts, seen, router, count):
    values = usage(seen)
    points = [np.mean([output(expert, x) for x in seen["x"]], 0) for expert in experts]
    groups = [[e] for e in range(len(experts))]
    while len(groups) > count:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        i, j = min(
            pairs,
            key=lambda p: np.mean([np.linalg.norm(points[a] - points[b]) for a in groups[p[0]] for b in groups[p[1]]]),
        )
        groups[i] = sorted(groups[i] + groups.pop(j))
    return groups, merge(experts, groups, values, aligned=False), mean_rows(router, groups, values)


def joint_subspace(matrices, values):
    """U S mean(V)^T, of the decomposition of all matrices side by side."""
    u, s, v = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
    parts = np.split(v, len(matrices), axis=1)
    return u @ np.diag(s) @ (sum(w * part for w, part in zip(values, parts, strict=True)) / sum(values))


def sub_moe(experts, seen, router, count):
    """K-means in the space of all directions side by side."""
    values = usage(seen)
    unit = [
        np.concatenate([output(e, x) / np.linalg.norm(output(e, x)) for x in seen["x"]]) / np.sqrt(len(seen["x"]))
        for e in experts
    ]
    centres = [int(np.argmax(values))]
    while len(centres) < count:
        away = [
            min(np.sum((p - unit[c]) ** 2) for c in centres) if e not in centres else -1 for e, p in enumerate(unit)
        ]
        centres.append(int(np.argmax(away)))
    means = [unit[c] for c in sorted(centres)]
    for _ in range(50):
        labels = [int(np.argmin([np.sum((p - m) ** 2) for m in means])) for p in unit]
        means = [np.mean([p for p, own in zip(unit, labels, strict=True) if own == k], 0) for k in range(count)]
    groups = sorted([e for e, own in enumerate(labels) if own == k] for k in range(count))
    merged = [
        {name: joint_subspace([experts[e][name] for e in g], [values[e] for e in g]) for name in experts[0]}
        for g in groups
    ]
    return groups, merged, mean_rows(router, groups, values)


def merge_moe(experts, seen, router, count, ridge=1e-3):
    values = usage(seen)
    read = [np.concatenate([e["gate"].ravel(), e["up"].ravel()]) for e in experts]
    groups = join(lambda e, c: -np.linalg.norm(read[e] - read[c]), top(values, count), len(experts))
    merged = merge(experts, groups, values, aligned=False)
    for group, own in zip(groups, merged, strict=True):
        if len(group) > 1:
            p = np.stack([hidden(own, x) for x in seen["x"]])
            total = sum(values[e] for e in group)
            y = np.stack([sum(values[e] / total * output(experts[e], x) for e in group) for x in seen["x"]])
            size = np.sqrt(ridge * np.mean(np.sum(p**2, 0)))
            # ridge to the mean, as more rows of an ordinary least squares problem
            rows = np.concatenate([p, size * np.eye(p.shape[1])])
            wanted = np.concatenate([y, size * own["down"].T])
            own["down"] = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    return groups, merged, mean_rows(router, groups, values)
