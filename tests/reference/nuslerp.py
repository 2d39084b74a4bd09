"""NuSLERP as documented by mergekit: Shoemake's formula on whole tensors or on vectors along an axis."""

import torch


def nuslerp(base, models, weight, nuslerp_flatten=True, nuslerp_row_wise=False):
    origin = torch.zeros_like(models[0], dtype=torch.float64) if base is None else base.double()
    a, b = models[0].double() - origin, models[1].double() - origin
    shape = a.shape
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    if nuslerp_flatten or a.dim() < 2:
        a, b, axis = a.reshape(1, -1), b.reshape(1, -1), 1
    else:
        # a row is all weights of one output unit
        a, b, axis = a.reshape(shape[0], -1), b.reshape(shape[0], -1), 0 if nuslerp_row_wise else 1
    unit_a = a / a.norm(dim=axis, keepdim=True)
    unit_b = b / b.norm(dim=axis, keepdim=True)
    cosine = (unit_a * unit_b).sum(dim=axis, keepdim=True).nan_to_num(0.0).clamp(-1, 1)
    theta = torch.acos(cosine)
    curved = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    merged = torch.where(1 - cosine**2 <= 1e-14, (1 - t) * a + t * b, curved)
    return origin + merged.reshape(shape)
