"""Yang et al. 2026, "RCP-Merging": each entry by itself, with the mean over samples in place of their vote."""


def rcp(base, models, fisher, gradient, *, scale=1.0, **given):
    base, (reasoning, domain) = base.double(), [model.double() for model in models]
    merged = reasoning.clone().reshape(-1)
    for i in range(merged.numel()):
        w0, wr, wd, f, g = (float(t.reshape(-1)[i]) for t in (base, reasoning, domain, fisher, gradient))
        if wd * g + given.get("lambda", 3.9) * (wr * wr * f) * (wr - wd) ** 2 < 0:
            merged[i] += scale * (wd - w0)
    return merged.view(base.shape)
