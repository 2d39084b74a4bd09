import torch

from merganser.ops import best, shares


def test_shares():
    assert shares(torch.tensor([1.0, 3.0, 0.0]).double()).tolist() == [0.25, 0.75, 0]
    assert shares(torch.tensor([0.0, 0.0]).double()).tolist() == [0.5, 0.5]
    # neither their sum nor a quotient leaves what float64 holds
    assert shares(torch.tensor([1.5e308, 1.5e308], dtype=torch.float64)).tolist() == [0.5, 0.5]
    assert shares(torch.tensor([5e-324, 0.0], dtype=torch.float64)).tolist() == [1, 0]


def test_the_best_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 16):
        score = torch.randint(0, 4, (n,), generator=generator).double()
        order = sorted(range(n), key=lambda i: -float(score[i]))
        for count in range(1, n + 2):
            assert best(score, count).nonzero().flatten().tolist() == sorted(order[:count])
