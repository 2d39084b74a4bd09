"""Gradients of parameters as sums of terms: what they add up to, and that they are summed the same in any pieces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import merganser
from merganser.calibration.reverse import run as reverse_run
from merganser.calibration.reverse import sums
from merganser.calibration.reverse.gradient import Gradient, Uses, part_gradients
from merganser.calibration.reverse.parameters import Part
from merganser.calibration.reverse.sums import GradientSums
from merganser.errors import NonFiniteError, UnsupportedError
from tests.calibration.test_calibrate import _model, _texts

ALL = ("fisher", "gradient", "absolute_gradient", "sensitivity")


class Net(nn.Module):
    """A model that uses its parameters in many ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(7, 4, padding_idx=2)
        self.places = nn.Embedding(5, 4)
        self.scaled = nn.Embedding(7, 4, scale_grad_by_freq=True)
        self.twice, self.turned, self.norm = nn.Linear(4, 4), Conv1D(6, 4), nn.LayerNorm(6)
        self.regular, self.shared = nn.Linear(6, 4, bias=False), nn.Linear(4, 7, bias=False)
        self.shared.weight = self.tokens.weight

    def hidden(self, ids: Tensor) -> Tensor:
        found = self.tokens(ids) + self.places(torch.arange(ids.shape[1])) + self.scaled(ids)
        return self.norm(self.turned(self.twice(torch.tanh(self.twice(found)))))

    def forward(self, ids: Tensor) -> Tensor:
        # the matrix is used for itself, too
        return self.shared(self.regular(self.hidden(ids))) * self.regular.weight.square().sum()


IDS = torch.tensor([[1, 2, 1, 5, 3]])


def observed(net: Net, value: Tensor, uses: Uses) -> dict[str, Gradient]:
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    uses.add({name: own for name, own in zip(parameters, found, strict=True) if own is not None})
    return uses.gradients


def test_terms_add_up_to_what_autograd_finds() -> None:
    net = Net()
    parameters = dict(net.named_parameters())
    labels = torch.tensor([0, 3, 6, 1, 2])
    plain = functional.cross_entropy(net(IDS)[0], labels, reduction="sum")
    expected = dict(zip(parameters, torch.autograd.grad(plain, list(parameters.values())), strict=True))
    uses = Uses(parameters)
    with uses:
        found = net(IDS)
    value = functional.cross_entropy(found[0], labels, reduction="sum")
    assert torch.equal(value, plain)
    gradients = observed(net, value, uses)
    assert gradients.keys() == expected.keys()
    for name, own in expected.items():
        torch.testing.assert_close(gradients[name].whole(parameters[name]), own, msg=name)
    # no matrix is formed that need not be
    formed = {name for name, own in gradients.items() if own.dense is not None and own.dense.dim() > 1}
    assert formed == {"scaled.weight", "regular.weight"}
    assert len(gradients["twice.weight"].products) == uses.products["twice.weight"] == 2
    assert gradients["places.weight"].rows is not None


@pytest.mark.parametrize("otherwise", [False, True])
def test_what_only_the_head_uses_is_formed_at_once(otherwise: bool) -> None:
    net = Net()
    parameters = dict(net.named_parameters())
    uses = Uses(parameters)
    with uses:
        # blocks lie between what the model receives and its head
        net.hidden(IDS)
        # its shape is no use of it, its sum is
        assert net.regular.weight.shape == (4, 6)
        if otherwise:
            net.regular.weight.sum()
        given = torch.randn(1, 5, 6).requires_grad_()
        found = net.shared(net.regular(given)) + net.turned(given[..., :4])[..., :1]
    gradients = observed(net, found.square().sum(), uses)
    whole = {name: own.whole(parameters[name]) for name, own in gradients.items()}
    formed, rest = part_gradients(uses, parameters)
    # `turned` is used before the head, too, and its bias is not a matrix
    regular = {"regular.weight"}
    assert set(formed) == {"tokens.weight"} | (set() if otherwise else regular)
    assert set(rest) == {"tokens.weight", "turned.weight", "turned.bias"} | (regular if otherwise else set())
    assert rest["tokens.weight"][0].tolist() == [1, 2, 3, 5]
    for name, own in whole.items():
        total = torch.zeros_like(own)
        if name in rest:
            total.index_add_(0, *rest[name])
        if name in formed:
            piece = torch.empty_like(own)
            formed[name].into(piece, 0)
            total += piece
        torch.testing.assert_close(total, own, msg=name)


def sequences(parameters: dict[str, nn.Parameter]) -> list[dict[str, Gradient]]:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    found = []
    for number in range(5):
        matrix = Gradient([(normal(6, 9), normal(6, 4)), (normal(3, 9), normal(3, 4))], dense=normal(9, 4))
        matrix.add_rows(torch.tensor([8, 1, 8]), normal(3, 4))
        matrix.skipped = torch.tensor([0, 4])
        table = Gradient()
        table.add_rows(torch.tensor([number, 3, 3]), normal(3, 4))
        found.append({"matrix": matrix, "table": table, "experts": Gradient(dense=normal(2, 3, 4))})
    return found


def summed(monkeypatch: pytest.MonkeyPatch, piece: int, waiting: int) -> dict[tuple[str, str], Tensor]:
    monkeypatch.setattr(sums, "PIECE", piece)
    monkeypatch.setattr(sums, "most_waiting", lambda entries: waiting)
    shapes = {"matrix": (9, 4), "table": (6, 4), "experts": (2, 3, 4)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    found = GradientSums(parameters, {name: Part(name) for name in shapes}, ALL, "a block")
    for own in sequences(parameters):
        found.add({**own, "another": Gradient(dense=torch.ones(1))}, "data.jsonl:1")
    return {key: own.take() for key, own in found.results().items()}


def test_waiting_changes_nothing_and_pieces_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = summed(monkeypatch, 1 << 16, 1 << 20)
    for waiting in (1, 900):
        other = summed(monkeypatch, 1 << 16, waiting)
        assert all(torch.equal(own, other[key]) for key, own in found.items())
    for piece in (1, 8, 12):
        # a product of a few rows adds its terms in another order on some processors
        torch.testing.assert_close(summed(monkeypatch, piece, 900), found, rtol=1e-6, atol=1e-6)
    every: dict[str, list[Tensor]] = {"matrix": [], "table": [], "experts": []}
    for own in sequences({}):
        matrix = own["matrix"]
        total = sum(left.double().T @ right.double() for left, right in matrix.products)
        total[[0, 4]] = 0
        assert matrix.dense is not None
        assert matrix.rows is not None
        every["matrix"].append((total + matrix.dense).index_add(0, matrix.rows[0], matrix.rows[1].double()))
        every["table"].append(own["table"].whole(torch.zeros(6, 4)).double())
        assert own["experts"].dense is not None
        every["experts"].append(own["experts"].dense.double())
    for name, own in every.items():
        for statistic, function in (
            ("fisher", torch.square),
            ("gradient", Tensor.double),
            ("absolute_gradient", torch.abs),
        ):
            expected = sum(map(function, own))
            torch.testing.assert_close(found[statistic, name].float(), expected.float(), msg=f"{statistic} of {name}")
        torch.testing.assert_close(found["sensitivity", name].float(), sum(each.abs().sum() for each in own).float())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_gradients_that_are_not_finite_are_refused(value: float) -> None:
    parameters = {"matrix": nn.Parameter(torch.ones(2, 3)), "table": nn.Parameter(torch.ones(2, 3))}
    found = GradientSums(parameters, {name: Part(name) for name in parameters}, ["fisher"], "model.layers.1")
    # large finite sums are none
    found.add({"matrix": Gradient(dense=torch.full((2, 3), 3e38))}, "data.jsonl:1")
    found.add({"matrix": Gradient([(torch.ones(1, 2), torch.ones(1, 3))])}, "data.jsonl:2")
    assert all(bool(own["matrix"].isfinite().all()) for own in found.totals().values())
    found.add({"matrix": Gradient([(torch.full((1, 2), value), torch.full((1, 3), 1e30))])}, "data.jsonl:3")
    message = "data.jsonl:3: the gradient of the loss is NaN or infinite for this text, in model.layers.1"
    with pytest.raises(NonFiniteError, match=message):
        found.results()


def test_a_head_that_shares_more_than_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _model(tmp_path / "model", "llama-tied"), _texts(tmp_path / "data.jsonl", count=1)

    def parted(*args: object) -> object:
        formed, rest = part_gradients(*args)
        return formed, {name: (rows[1:], values[1:]) for name, (rows, values) in rest.items()}

    monkeypatch.setattr(reverse_run, "part_gradients", parted)
    with pytest.raises(
        UnsupportedError, match=r"LlamaForCausalLM uses .*embed_tokens.weight in its blocks and in its head"
    ):
        merganser.calibrate(model, [data], tmp_path / "out", statistics=["fisher"], length=24)
