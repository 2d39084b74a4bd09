"""Bandarkar et al. 2025, "Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models", algorithm 1.

For each layer l of L: the language expert's where l < b or l > L - 1 - u; the task expert's where l > b - 1 + t_b and
l < L - u - t_u; their weighted average in between. What is outside of layers: as it is asked for.
"""


def layer_swap(
    task,
    language,
    layer,
    n_layers,
    *,
    outside="mix",
    bottom=5,
    top=2,
    bottom_transition=1,
    top_transition=1,
    t=0.5,
):
    """One tensor of layer `layer` (None: outside of layers), float64."""
    task, language = task.double(), language.double()
    average = (1 - t) * task + t * language
    if layer is None:
        return {"first": task, "second": language, "mix": average}[outside]
    if layer < bottom or layer > n_layers - 1 - top:
        return language
    if layer > bottom - 1 + bottom_transition and layer < n_layers - top - top_transition:
        return task
    return average
