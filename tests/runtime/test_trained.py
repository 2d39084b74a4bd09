"""Layers that are trained: the formulas, what padding does, that they learn, and what is refused."""

import pytest
import torch

from merganser.errors import ParameterError, UnsupportedError
from merganser.runtime.trained import DeleteGate, GroupMerging, RateController, SemanticAlignment, softmax1
from tests.reference import delete_gate as gate_reference
from tests.reference.group_merging import group_merging
from tests.runtime.making import model, text


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gate_of(size=6, **options):
    torch.manual_seed(0)
    made = DeleteGate(size, **options)
    torch.nn.init.normal_(made.score.weight, std=2)
    torch.nn.init.normal_(made.norm.weight, mean=1, std=0.3)
    return made


def test_the_gate():
    made, hidden = gate_of(), states(2, 9, 6)
    found = made(hidden)
    gain, weight = made.norm.weight.tolist(), made.score.weight[0].tolist()
    for row in range(2):
        expected = gate_reference.gate(hidden[row].tolist(), gain, weight, made.score.bias.item(), -30.0)
        torch.testing.assert_close(found.values[row], torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert found.deleted[row].tolist() == [each < -15 for each in expected]
    assert 0 < found.rate < 1
    assert found.rate == found.deleted.float().mean()
    torch.testing.assert_close(found.penalty, found.values.mean())
    assert DeleteGate(6).score.bias.item() == 1


def test_padding_counts_for_nothing():
    made, hidden = gate_of(), states(2, 9, 6)
    mask = torch.ones(2, 9)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    found, other = made(hidden, mask), made(hidden * (1 + 9 * (1 - mask[..., None])), mask)
    assert torch.equal(found.penalty, other.penalty)
    assert found.rate == other.rate
    assert bool((found.values[mask == 0] == -30).all())
    assert bool(found.deleted[mask == 0].all())
    left, there, places = made.delete(hidden, found)
    for row in range(2):
        kept = [place for place in range(9) if not found.deleted[row, place]]
        assert places[row, there[row]].tolist() == kept
        assert torch.equal(left[row, there[row]], hidden[row, kept])
    assert bool((left[~there] == 0).all())


def test_soft_and_hard_deletion_agree():
    """Attention with deleted tokens far down, and attention without them."""
    made, hidden = gate_of(scale=-90.0), states(1, 12, 6)
    made.score.weight.data *= 40
    found = made(hidden)
    assert 0 < found.rate < 1
    left, _, _ = made.delete(hidden, found)
    query = states(3, 6, seed=1)
    soft = softmax1(query @ hidden[0].T + found.values) @ hidden[0]
    torch.testing.assert_close(soft, softmax1(query @ left[0].T) @ left[0], rtol=1e-4, atol=1e-5)


def test_softmax1():
    logits = states(2, 7) * 3
    expected = [gate_reference.softmax1(row.tolist()) for row in logits]
    torch.testing.assert_close(softmax1(logits), torch.tensor(expected))
    assert softmax1(torch.full((3,), -1e4)).tolist() == [0, 0, 0]
    assert softmax1(torch.full((4,), 1e4)).tolist() == [0.25] * 4
    small = softmax1(torch.full((1,), -12.0, dtype=torch.float16))
    torch.testing.assert_close(small.float(), torch.tensor([-12.0]).exp(), rtol=0.02, atol=0)


def test_the_controller():
    rates = [0.0, 0.2, 0.9, 0.6, 0.1, 1.0, 1.0, 1.0]
    controller = RateController(0.5, proportional=0.4, integral=0.01)
    found = [controller.step(rate) for rate in rates]
    assert found == pytest.approx(gate_reference.controller(0.5, rates, 0.4, 0.01))
    assert found[-1] == 0


def test_the_gate_learns_what_to_delete():
    """Tokens of one kind cost nothing when they are deleted: the controller deletes those, and no others."""
    torch.manual_seed(0)
    hidden = states(4, 20, 8)
    needed = hidden[..., 0] > 0
    made, controller = DeleteGate(8, noise=True), RateController(float((~needed).float().mean()), proportional=2.0)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    before = made.eval()(hidden).deleted
    made.train()
    for _ in range(150):
        gate = made(hidden)
        loss = -gate.values[needed].mean() + controller.step(gate.rate) * gate.penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    found = made(hidden)
    assert float((before == ~needed).float().mean()) < 0.7
    assert float((found.deleted == ~needed).float().mean()) > 0.9
    assert torch.equal(made(hidden).values, found.values)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_groups(size):
    hidden = states(3, 11, 6)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 8:] = 0
    mask[1, :5] = 0
    # what padding holds must not matter
    found, there = GroupMerging(size)(hidden.masked_fill(mask[..., None] == 0, float("nan")), mask)
    for row in range(3):
        expected = group_merging(hidden[row].double(), mask[row].bool(), size)
        assert there[row].sum() == len(expected)
        torch.testing.assert_close(found[row, there[row]], torch.stack(expected).float())
    assert bool((found[~there] == 0).all())
    assert torch.equal(GroupMerging(9)(hidden, mask, size=size)[0], GroupMerging(size)(hidden, mask)[0])
    assert torch.equal(GroupMerging(1)(hidden)[0], hidden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_alignment_is_the_lowest_layers(kind, attention):
    made, hidden = model(kind, attention), states(2, 9, 32)
    align = SemanticAlignment(made, 2)
    expected = made.model(inputs_embeds=hidden, output_hidden_states=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    # the last of transformers' states is behind the norm
    torch.testing.assert_close(made.model.norm(align(hidden, mask)), expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    one = SemanticAlignment(made)(hidden, mask)
    torch.testing.assert_close(one, expected.hidden_states[1], rtol=1e-4, atol=1e-4)
    mask[0, 6:] = False
    alone = align(hidden[:1, :6], mask[:1, :6])
    torch.testing.assert_close(align(hidden, mask)[:1, :6], alone, rtol=1e-4, atol=1e-4)


def test_a_compressed_text_is_learned():
    """An autoencoder of a few steps: the model repeats what it reads as soft tokens, and only the alignment is trained."""
    made, tokens = model(vocab_size=32), text(8, rows=2, seed=5) % 32
    made.requires_grad_(False)
    before = {name: each.clone() for name, each in made.state_dict().items()}
    merging = GroupMerging(2, SemanticAlignment(made).requires_grad_(True))
    optimizer = torch.optim.Adam(merging.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        soft, there = merging(made.model(tokens).last_hidden_state)
        embeds = torch.cat((soft, made.get_input_embeddings()(tokens[:, :-1])), dim=1)
        logits = made(inputs_embeds=embeds).logits[:, soft.shape[1] - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert bool(there.all())
    assert all(torch.equal(each, before[name]) for name, each in made.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DeleteGate(4, scale=1), ParameterError, "scale: must be below 0, not 1"),
        (lambda: DeleteGate(4, threshold=-31), ParameterError, "threshold: must be between -30.0 and 0, not -31"),
        (lambda: DeleteGate(4)(states(1, 3, 4), torch.zeros(1, 3)), ParameterError, "mask: every token is padding"),
        (lambda: RateController(1), ParameterError, "target: must be a share from 0 to below 1, not 1"),
        (lambda: GroupMerging(0), ParameterError, "size: must be a whole number of at least 1, not 0"),
        (lambda: GroupMerging(2)(states(1, 3, 4), size=0.5), ParameterError, "size: must be a whole number"),
        (lambda: GroupMerging(2)(states(1, 3, 4), torch.zeros(1, 3)), ParameterError, "mask: every token is padding"),
        (lambda: SemanticAlignment(model(), 3), ParameterError, "layers: the model has 2, not 3"),
        (
            lambda: SemanticAlignment(model("mistral", sliding_window=16)),
            UnsupportedError,
            "semantic alignment: the model has layers with a sliding window",
        ),
        (
            lambda: SemanticAlignment(torch.nn.Linear(1, 1)),
            UnsupportedError,
            "models of type 'Linear' are not supported",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error) as found:
        call()
    assert message in str(found.value)


def test_a_row_that_loses_everything():
    made = gate_of()
    hidden = states(3, 4, 6)
    mask = torch.ones(3, 4)
    mask[1] = 0
    with torch.no_grad():
        made.score.weight.zero_()
    with pytest.raises(UnsupportedError, match="row 1 would lose all of its tokens"):
        made.delete(hidden, made(hidden, mask))
