"""A copy, times a factor."""


def passthrough(base, models, scale=(1.0,)):
    return models[0].double() * scale[0]
