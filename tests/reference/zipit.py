"""Stoica et al. 2024, "ZipIt!", algorithm 1 and equations 3 to 5, written out with matrices, in float64."""

import torch

from tests.reference.regmean_plus import inputs_of, transposed


def zip_matrix(similarity, count, alpha, beta):
    """The matrix U, shape [count n, n]: which feature belongs to which merged one."""
    similarity = similarity.double().clone()
    total = len(similarity)
    n = total // count
    similarity.fill_diagonal_(-torch.inf)
    columns = torch.eye(total, dtype=torch.float64)
    original, firsts = similarity.clone(), list(range(total))
    origin = [i // n for i in range(total)]
    budget = [int((total - n) // count * beta + 1e-4)] * count

    def forbid(model):
        for i, a in enumerate(origin):
            for j, b in enumerate(origin):
                if a == b == model:
                    similarity[i, j] = -torch.inf

    for model in range(count):
        if budget[model] == 0:
            forbid(model)
    while columns.shape[1] > n:
        scores = similarity if similarity.max() > -torch.inf else original[firsts][:, firsts]
        place = int(scores.flatten().argmax())
        i, j = sorted((place // len(similarity), place % len(similarity)))
        columns[:, i] += columns[:, j]
        row = torch.minimum(similarity[i], similarity[j]) * alpha
        row[i] = -torch.inf
        similarity[i], similarity[:, i] = row, row
        keep = [k for k in range(len(similarity)) if k != j]
        columns, similarity = columns[:, keep], similarity[keep][:, keep]
        same, model = origin[i] == origin[j], origin[i]
        origin, firsts = [origin[k] for k in keep], [firsts[k] for k in keep]
        if same:
            budget[model] -= 1
            if budget[model] == 0:
                forbid(model)
    return columns


def zipped(models, rows, columns):
    """One matrix: M blockdiag(models) U. rows, columns: the matrix U of its outputs and of its inputs."""
    return (rows / rows.sum(0)).T @ torch.block_diag(*(model.double() for model in models)) @ columns


def zipit_walk(models, sequences, blocks, *, alpha, beta):
    """Whole models whose hidden units are zipped, as a state dict; heads, channels and all else are averaged."""
    states = [{key: value.double() for key, value in model.state_dict().items()} for model in models]
    merged = {key: sum(state[key] for state in states) / len(states) for key in states[0]}
    for block in blocks:
        received = [inputs_of(model, block, sequences) for model in models]
        down = next(key for key in received[0] if key.endswith(("mlp.down_proj.weight", "mlp.c_proj.weight")))
        scores = torch.corrcoef(torch.cat([rows[down] for rows in received], 1).T)
        hidden = zip_matrix(scores, len(models), alpha, beta)
        for key in states[0]:
            if not key.startswith(f"{block}.mlp."):
                continue
            turned = transposed(models[0], key) if key.endswith("weight") else False
            each = [state[key].T if turned else state[key] for state in states]
            outer = merged[key].T if turned else merged[key]
            names = [torch.cat([torch.eye(length, dtype=torch.float64)] * len(models)) for length in outer.shape]
            if "down_proj" in key or "c_proj" in key:
                value = outer if outer.dim() == 1 else zipped(each, names[0], hidden)
            elif outer.dim() == 1:
                one = torch.ones(len(models), 1, dtype=torch.float64)
                value = zipped([own[:, None] for own in each], hidden, one)[:, 0]
            else:
                value = zipped(each, hidden, names[1])
            merged[key] = value.T if turned else value
    return merged
