"""Nobari et al. 2025, "Activation-Informed Merging of Large Language Models", as in the authors' code, column by column."""


def aim(base, merge, magnitude, *, omega=0.4, quantile=1.0):
    base, merge, magnitude = base.double(), merge.double(), magnitude.double().abs()
    found = base.clone()
    top = sorted(magnitude.tolist())
    place = quantile * (len(top) - 1)
    low = int(place)
    most = top[low] + (place - low) * (top[min(low + 1, len(top) - 1)] - top[low])
    for column in range(base.shape[1]):
        share = min(float(magnitude[column]) / most, 1.0)
        found[:, column] += (merge[:, column] - base[:, column]) * (1 - share * (1 - omega))
    return found
