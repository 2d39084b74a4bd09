"""Fu et al. 2025, "MergeVLA: Cross-Skill Model Merging Toward a Generalist Vision-Language-Action Agent", the test-time task router.

V = L Sigma R^T for a value projection V; P = the first k_r rows of R^T; r_m = || P h_m ||_2 for the hidden states h_m that the model
with the mask of task m has there, its mean over tokens (as in the authors' code), then the mean over the value projections; the task
with the largest softmax of r is chosen.
"""

import torch


def task_scores(weights, states, rank):
    """Scores [rows, tasks]; weights[m][p] is [out, in], states[m][p] is a list of rows, each [tokens, in]."""
    columns = []
    for own, read in zip(weights, states, strict=True):
        each = []
        for weight, rows in zip(own, read, strict=True):
            _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            kept = [vector for value, vector in zip(values, right, strict=True) if value > 1e-9 * values[0]][:rank]
            each.append([_length(kept, tokens) for tokens in rows])
        columns.append([sum(scores) / len(scores) for scores in zip(*each, strict=True)])
    return torch.tensor(columns, dtype=torch.float64).T


def _length(directions, tokens):
    lengths = [sum(float(direction @ token.double()) ** 2 for direction in directions) ** 0.5 for token in tokens]
    return sum(lengths) / len(lengths)
