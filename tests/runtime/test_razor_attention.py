"""RazorAttention: heads that keep everything, and heads with one token for all that is far."""

import pytest
import torch
from transformers import DynamicCache

from merganser.errors import DataError, MergeError, OutputError, ParameterError
from merganser.runtime import MergedCache, RetrievalHeads, find_retrieval_heads
from merganser.runtime.caches.razor_attention import RazorAttention
from tests.reference.razor_attention import razor_attention
from tests.runtime.making import model, text

HEADS = RetrievalHeads(2, ((), (1,), (0, 1)))
NEAR = {"sinks": 2, "window": 6, "share": 0.0}


def made_of():
    return model(num_hidden_layers=3)


def test_the_output_of_a_head():
    layer = RazorAttention.build(3, {"heads": HEADS, **NEAR})[1]
    keys, values = torch.randn(2, 1, 2, 31, 8, generator=torch.Generator().manual_seed(0))
    for new_keys, new_values in zip(keys.split([20, 1, 9, 1], 2), values.split([20, 1, 9, 1], 2), strict=True):
        bias = layer.bias()
        all_keys, all_values = layer.update(new_keys, new_values)
    query = torch.randn(8, generator=torch.Generator().manual_seed(1))
    logits = (all_keys[0] @ query) * 0.3
    logits[:, :-1] += bias[0]
    found = (logits.softmax(-1)[..., None] * all_values[0]).sum(1)
    # the last call sees its own token beside 2 sinks and 6 tokens
    expected = razor_attention(query.double(), keys[0, 0].double(), values[0, 0].double(), 0.3, sinks=2, recent=7)
    torch.testing.assert_close(found[0], expected.float(), rtol=1e-4, atol=1e-5)
    whole = ((keys[0, 1] @ query) * 0.3).softmax(-1) @ values[0, 1]
    torch.testing.assert_close(found[1], whole, rtol=1e-4, atol=1e-5)


def test_as_long_as_nothing_is_far_nothing_changes():
    made, tokens = made_of(), text(20, rows=2)
    plain = DynamicCache(config=made.config)
    cache = MergedCache("razor_attention", made, heads=HEADS, sinks=2, window=18)
    for part in tokens.split([15, 1, 4], dim=1):
        assert torch.equal(made(part, past_key_values=cache).logits, made(part, past_key_values=plain).logits)


def test_a_share_of_a_long_text_stays():
    layer = RazorAttention.build(3, {"heads": HEADS, "sinks": 2, "window": 4, "share": 0.5})[0]
    layer.update(*torch.zeros(2, 1, 2, 40, 8))
    assert (layer.kept(), layer.far) == (23, 18)


def test_heads_that_look_back_are_found():
    """A head whose attention is set to look at the same token, and no other head, is found as one that echoes."""
    made = model(
        "qwen2",
        num_hidden_layers=2,
        hidden_size=64,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    made.model.embed_tokens.weight.data = torch.eye(64)
    for layer in made.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
    # dimensions that rotate slowly; a random code per token
    attention = made.model.layers[0].self_attn
    code = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 2
    attention.q_proj.weight.data[2 * 16 + 4 : 2 * 16 + 8] = code
    attention.k_proj.weight.data[1 * 16 + 4 : 1 * 16 + 8] = code
    found = find_retrieval_heads(made, tokens=20, repeats=3, induction=0, echo=0.1)
    assert found == RetrievalHeads(2, ((1,), ()))
    assert find_retrieval_heads(made, tokens=20, repeats=3, induction=1.0, echo=0).layers == ((0, 1), (0, 1))


def test_files(tmp_path):
    file = tmp_path / "heads.json"
    HEADS.save(file)
    assert RetrievalHeads.load(file) == HEADS
    with pytest.raises(OutputError, match="file exists"):
        HEADS.save(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"layers": []}', "is not a file of retrieval heads"),
        ('{"key_heads": 2, "layers": [], "more": 1}', "is not a file of retrieval heads"),
        ('{"key_heads": true, "layers": []}', "is not a file of retrieval heads"),
        ('{"key_heads": 2, "layers": {}}', "is not a file of retrieval heads"),
        ('{"key_heads": 2, "layers": [[], [2]]}', "layer 1: must be a list of different heads below 2"),
        ('{"key_heads": 2, "layers": [[1, 0]]}', "layer 0: must be"),
        ('{"key_heads": 2, "layers": [3]}', "layer 0: must be"),
        ('{"key_heads": 2, "layers": [["0"]]}', "layer 0: must be"),
    ],
)
def test_files_are_checked(tmp_path, content, message):
    file = tmp_path / "heads.json"
    file.write_text(content)
    with pytest.raises(DataError) as error:
        RetrievalHeads.load(file)
    assert message in str(error.value)


def test_options_are_checked(tmp_path):
    made = made_of()
    for options, message in [
        ({"heads": "heads.json"}, "heads: must be what find_retrieval_heads returns, not str"),
        ({"heads": RetrievalHeads(2, ((),))}, "heads: they are those of 1 layers, and the model has 3"),
        ({"heads": HEADS, "share": 2}, "share: must be a share from 0 to 1, not 2"),
        ({}, "razor_attention: heads is missing"),
    ]:
        with pytest.raises(ParameterError, match=message):
            MergedCache("razor_attention", made, **options)
    other = MergedCache("razor_attention", made, heads=RetrievalHeads(3, ((), (), ())))
    with pytest.raises(ParameterError, match="those of 3 key heads, not 2"):
        made(text(4), past_key_values=other)
    with pytest.raises(ParameterError, match="echo: must be a share"):
        find_retrieval_heads(made, echo=2)
    with pytest.raises(MergeError):
        RetrievalHeads.load(tmp_path / "nothing.json")
