"""Outputs in programs that serve models: recipes that are made, and a comparison that sees a difference."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.serving import cases, tiny
from benchmarks.serving.compare import compared, put_experts
from benchmarks.serving.table import rows_of_table
from benchmarks.serving.work import MakingError, Work
from merganser.mixture import mix
from tests.mixture.making import make_models, recipe


def test_names_tell_cases_apart():
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert len({case.what for case in cases.CASES}) == len(cases.CASES)


class _Model:
    """Says that the token after each one is the next number, with a probability that depends on its position."""

    def __call__(self, input_ids):
        size = input_ids.shape[1]
        logits = torch.zeros(1, size, 8)
        logits[0, torch.arange(size), (input_ids[0] + 1) % 8] = torch.arange(size) + 1.0
        return type("Said", (), {"logits": logits})


def test_other_tokens_and_probabilities_are_seen():
    said = torch.log_softmax(torch.tensor([[float(n + 1), *[0.0] * 7] for n in range(4)]), -1)[:, 0].tolist()
    right = {"tokens": [3, 4, 5], "logprobs": said}
    assert compared(_Model(), [[1, 2]], [right]) == {
        "tokens": 3,
        "same": 3,
        "largest": pytest.approx(0, abs=1e-6),
        "mean": pytest.approx(0, abs=1e-6),
    }
    other = compared(_Model(), [[1, 2]], [{"tokens": [3, 4, 6], "logprobs": [*said[:3], said[3] + 0.5]}])
    assert (other["same"], other["largest"] > 0.4) == (2, True)
    assert compared(_Model(), [[1, 2]], [{**right, "logprobs": [float("nan"), *said[1:]]}])["largest"] == float("inf")


def test_the_definition_of_deepseek_is_that_of_mixtral_without_a_shared_expert(tmp_path):
    """Both weigh the best experts by the softmax of their logits."""
    base, *experts = make_models(tmp_path, "llama", 4)
    written = recipe(base, experts, experts_per_token=2)
    ours = mix(written | {"architecture": "deepseek"}, tmp_path / "deepseek").out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mix(written, tmp_path / "mixtral").out)
    # random rows depend on their names, which differ
    rows = load_file(ours / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[5, 9, 100, 33, 7, 250, 11]])
    with torch.no_grad():
        for number, layer in enumerate(theirs.model.layers):
            layer.mlp.gate.weight.copy_(rows[f"model.layers.{number}.mlp.gate.weight"])
        before = model(ids).logits
        put_experts(model, ours)
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(ids).logits, before, atol=0.01)


def test_a_command_that_fails_says_why(tmp_path):
    work = Work(tmp_path, tmp_path)
    with pytest.raises(MakingError, match=r"merganser merge: .*unknown merge method 'linea'"):
        work.merge("x", {"merge_method": "linea", "models": [{"model": "a"}]})
    assert not (tmp_path / "x").exists()


def test_the_table():
    rows = {
        "a": {"what": "one", "tokens": 48, "same": 48, "largest": 1e-5, "agrees": True},
        "b": {"what": "two", "tokens": 48, "same": 40, "largest": 3.0, "agrees": False, "stand_in": True},
        "c": {"what": "three", "error": "ValueError: no", "written_by_transformers": "loads"},
        "d": {"what": "four", "error": "ValueError: no", "written_by_transformers": "ValueError: no"},
    }
    lines = list(rows_of_table({"vllm": {"versions": {"vllm": "1"}, "rows": rows}}))
    assert lines[0] == "vLLM (vllm 1)"
    assert lines[4:8] == [
        "| one | yes | 48 of 48 | 1.0e-05 |",
        "| two ¹ | yes | 40 of 48 | 3.0e+00 **differs** |",
        "| three | no: ValueError: no (what transformers wrote loads) | |  |",
        "| four | no: ValueError: no (nor what transformers wrote) | |  |",
    ]
    assert tiny.text(1, 3) == tiny.text(1, 3)
