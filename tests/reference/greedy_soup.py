"""Wortsman et al. 2022, "Model soups", recipe 1: models sorted by held-out accuracy, here without the check at each step.

theta_S = average(ingredients), ingredients = the first `keep` of the sorted list.
"""


def greedy_soup(base, models, *, score, keep):
    order = sorted(range(len(models)), key=lambda i: score[i], reverse=True)
    soup = models[order[0]].double()
    for count, i in enumerate(order[1:keep], start=1):
        soup = (count * soup + models[i].double()) / (count + 1)
    return soup
