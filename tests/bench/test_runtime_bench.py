"""The benchmark of caches: what a cache is given is what it would see in the model, and budgets take equal bytes."""

import torch

from benchmarks.runtime.__main__ import METHODS, Prompt, answer, bits, budget, caches
from merganser.runtime import MergedCache
from tests.runtime.making import model, text


def test_a_prompt_that_ran_once():
    made, tokens = model(), text(90)
    prompt = Prompt(made, tokens[:, :80], 60)
    for method in METHODS:
        options = {"budget": 50, "history": 60} if method in ("d2o", "ems") else {"budget": 50}
        cache = MergedCache(method, made, **options)
        with torch.no_grad():
            first = made(tokens[:, :80], past_key_values=cache).logits[:, -1:]
            logits = torch.cat((first, made(tokens[:, 80:-1], past_key_values=cache).logits), dim=1).log_softmax(-1)
        expected = float(-logits.gather(-1, tokens[:, 80:, None]).mean() / torch.tensor(2.0).log())
        found = bits(made, prompt, MergedCache(method, made, **options), tokens[:, 80:])
        assert abs(found - expected) < 1e-4
    plain = made.generate(tokens[:, :80], max_new_tokens=5, do_sample=False)[0, 80:].tolist()
    assert answer(made, prompt, caches(made, 50, [])["whole"](), 5) == plain


def test_equal_bytes():
    made, tokens = model(), text(100)
    prompt = Prompt(made, tokens, 60)
    found = {name: prompt.into(make()).stored_bytes() for name, make in caches(made, 60, METHODS).items()}
    assert found["snapkv"] == 60 * 2 * 2 * 2 * 8 * 4
    one = found["snapkv"] // 60
    assert all(found["snapkv"] - 2 * one < found[name] <= found["snapkv"] for name in METHODS)
    assert budget("ems", 60, 64) == 60 * 64 // 72
