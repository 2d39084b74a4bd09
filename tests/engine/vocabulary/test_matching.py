"""Merges whose rows are matched by token equal merges of models whose rows were moved by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError, MergeError, RecipeError, UnsupportedError
from tests.engine.vocabulary.by_hand import EMBEDDING, HEAD, bpe, model, moved, tokens_of
from tests.making import Tensors, llama, llama_config, make_recipe, read_model, write_model

WORDS = [f"w{i}" for i in range(28)]
A = bpe(WORDS, ["<s>", "</s>"])
PERMUTED = bpe(WORDS[::-1], ["</s>", "<s>"])
B = bpe([*WORDS[:20], "new", "newer"], ["<s>", "</s>", "<tool>"])
C = bpe([*WORDS[:24], "newer"], ["</s>", "<think>"])


def write(root: Path, *documents: dict[str, Any] | None, **options: Any) -> list[Path]:
    return [model(root / f"m{i}", i, document, **options) for i, document in enumerate(documents)]


def expected(
    root: Path, paths: list[Path], documents: list[dict[str, Any]], out: dict[str, int], rows: int, **keys: Any
) -> Tensors:
    """Merge copies that were moved by hand and have no tokenizer."""
    base = 0 if "base_model" in keys else None
    loaded = [
        (load_file(path / "model.safetensors"), tokens_of(doc)) for path, doc in zip(paths, documents, strict=True)
    ]
    hand = [
        write_model(root / f"hand{i}", tensors, llama_config(vocab=rows, tied=HEAD not in tensors))
        for i, tensors in enumerate(moved(loaded, out, rows, base))
    ]
    return read_model(merge(recipe(hand, **keys), root / "by-hand").out)


def recipe(paths: list[Path], **keys: Any) -> dict[str, Any]:
    if "base_model" in keys:
        return (
            make_recipe("task_arithmetic", paths[1:], parameters={"weight": 0.5}) | keys | {"base_model": str(paths[0])}
        )
    return make_recipe("linear", paths, parameters={"weight": 0.5}) | keys


def union_of(documents: list[dict[str, Any]]) -> dict[str, int]:
    out = dict(tokens_of(documents[0]))
    for document in documents[1:]:
        for token in sorted(tokens_of(document), key=lambda token: tokens_of(document)[token]):
            out.setdefault(token, len(out))
    return out


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("keys", [{}, {"base_model": ""}])
def test_the_union(tmp_path: Path, keys: dict[str, Any], head: bool) -> None:
    documents = [A, B, C]
    paths = write(tmp_path, *documents, head=head)
    out = union_of(documents)
    rows = max(32, len(out))
    result = merge(recipe(paths, tokenizer_source="union", **keys), tmp_path / "out")
    found = read_model(result.out)
    wanted = expected(tmp_path, paths, documents, out, rows, **keys)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert tokens_of(json.loads((result.out / "tokenizer.json").read_text())) == out
    assert json.loads((result.out / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("other", [PERMUTED, C])
def test_the_tokenizer_of_one_model(tmp_path: Path, owner: int, other: dict[str, Any]) -> None:
    documents = [A, other]
    paths = write(tmp_path, *documents)
    out = tokens_of(documents[owner])
    found = merge(recipe(paths, tokenizer_source=str(paths[owner])), tmp_path / "out")
    loaded = [(load_file(p / "model.safetensors"), tokens_of(d)) for p, d in zip(paths, documents, strict=True)]
    hand = moved(loaded, out, 32, None)
    merged = read_model(found.out)
    for name in (EMBEDDING, HEAD):
        rows = sorted(out.values())
        wanted = (hand[0][name] + hand[1][name])[rows] / 2
        torch.testing.assert_close(merged[name][rows], wanted, rtol=0, atol=0)
    assert (found.out / "tokenizer.json").read_bytes() == (paths[owner] / "tokenizer.json").read_bytes()


def test_rows_without_tokens_are_matched_by_their_number(tmp_path: Path) -> None:
    paths = write(tmp_path, A, PERMUTED)
    first, second = (load_file(path / "model.safetensors")[EMBEDDING] for path in paths)
    merged = read_model(merge(recipe(paths, tokenizer_source="base"), tmp_path / "out").out)[EMBEDDING]
    assert torch.equal(merged[30:], (first + second)[30:] / 2)


def test_models_of_other_sizes(tmp_path: Path) -> None:
    paths = [model(tmp_path / "a", 0, A, rows=30), model(tmp_path / "b", 1, B, rows=40)]
    found = merge(recipe(paths, tokenizer_source="base"), tmp_path / "out")
    merged = read_model(found.out)[EMBEDDING]
    second = load_file(paths[1] / "model.safetensors")[EMBEDDING]
    first = load_file(paths[0] / "model.safetensors")[EMBEDDING]
    assert merged.shape == (30, 16)
    # w25 is not a token of b, which takes the row of a
    assert torch.equal(merged[25], first[25])
    assert torch.equal(merged[29], (first[29] + second[tokens_of(B)["</s>"]]) / 2)
    [change] = [each for each in found.record["vocabulary"]["models"] if each["model"] == str(paths[1])]
    assert (change["kept"], change["moved"], change["made"], change["lost"]) == (20, 2, {"copy": 8}, 3)


def test_made_rows_are_rounded_once(tmp_path: Path) -> None:
    """A mean of bfloat16 rows is not rounded before the merge."""
    documents = [A, B, bpe([*WORDS[:20], "newer", "new"], ["<s>"])]
    paths = write(tmp_path, *documents, dtype=torch.bfloat16)
    found = merge(recipe(paths, tokenizer_source="union"), tmp_path / "out")
    assert found.record["dtypes"] == ["bfloat16"]
    merged = read_model(found.out)[EMBEDDING]
    tensors = [load_file(path / "model.safetensors")[EMBEDDING].double() for path in paths]
    rows = [tokens_of(document).get("new") for document in documents]
    mean = (tensors[1][rows[1]] + tensors[2][rows[2]]) / 2
    assert torch.equal(
        merged[union_of(documents)["new"]], ((mean + tensors[1][rows[1]] + tensors[2][rows[2]]) / 3).bfloat16()
    )


def test_a_tied_and_an_untied_model(tmp_path: Path) -> None:
    """A new row of the output's head comes from the other model's head, not from its embedding."""
    paths = [model(tmp_path / "a", 0, A, head=False), model(tmp_path / "b", 1, B)]
    merged = read_model(merge(recipe(paths, tokenizer_source="union"), tmp_path / "out").out)
    head = load_file(paths[1] / "model.safetensors")[HEAD]
    assert torch.equal(merged[HEAD][union_of([A, B])["new"]], head[tokens_of(B)["new"]])


RULES: list[tuple[dict[str, Any], str]] = [
    ({"source": {"kind": "zero"}}, "zero"),
    ({"source": {"kind": "mean"}}, "mean"),
    ({"source": "m1"}, "own"),
    ({"source": {"kind": "model_token", "model": "m1", "token": "w3"}}, "w3"),
    ({"source": {"kind": "model_token", "model": "m1", "token_id": 31}}, "31"),
]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("rule", "kind"), RULES)
def test_rules_for_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], kind: str, force: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, A, B)
    keys = {"tokenizer": {"source": "union", "tokens": {"new": rule | {"force": force}}}}
    merged = read_model(merge(recipe([Path("m0"), Path("m1")], **keys), "out").out)[EMBEDDING]
    first, second = (load_file(f"m{i}/model.safetensors")[EMBEDDING] for i in range(2))
    own = second[tokens_of(B)["new"]]
    made = {
        "zero": [torch.zeros(16)] * 2,
        "mean": [first[:30].double().mean(0).float(), second[:25].double().mean(0).float()],
        "own": [own] * 2,
        "w3": [second[3]] * 2,
        "31": [second[31]] * 2,
    }[kind]
    wanted = (made[0] + (made[1] if force else own)) / 2
    torch.testing.assert_close(merged[union_of([A, B])["new"]], wanted, rtol=1e-6, atol=1e-8)


def test_new_tokens_and_padding(tmp_path: Path) -> None:
    paths = write(tmp_path, A, A)
    rules = {"<|im_start|>": {"source": {"kind": "model_token", "model": str(paths[1]), "token": "<s>"}}}
    found = merge(
        recipe(paths, tokenizer={"source": "base", "tokens": rules, "pad_to_multiple_of": 20}), tmp_path / "out"
    )
    merged = read_model(found.out)
    first, second = (load_file(path / "model.safetensors") for path in paths)
    assert merged[HEAD].shape == (40, 16)
    assert torch.equal(merged[HEAD][30], second[HEAD][28])
    for row in (32, 39):
        padding = (first[HEAD][:30].double().mean(0).float() + second[HEAD][:30].double().mean(0).float()) / 2
        torch.testing.assert_close(merged[HEAD][row], padding, rtol=1e-6, atol=1e-8)
    added = json.loads((found.out / "tokenizer.json").read_text())["added_tokens"]
    assert (added[-1]["id"], added[-1]["content"], added[-1]["special"]) == (30, "<|im_start|>", False)


def test_as_mergekit_has_it(tmp_path: Path) -> None:
    """Rows without tokens are cut off, and a token that no model has is zero."""
    paths = write(tmp_path, A, A)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tokenizer.json").write_text(json.dumps(bpe([*WORDS, "unknown"])))
    found = merge(recipe(paths, tokenizer_source=str(outside), compat="mergekit"), tmp_path / "out")
    merged = read_model(found.out)[EMBEDDING]
    assert merged.shape == (29, 16)
    assert not merged[28].any()
    assert any("1 token that no model has" in warning for warning in found.record["warnings"])


def test_a_tokenizer_from_outside(tmp_path: Path) -> None:
    paths = write(tmp_path, A, A)
    outside = write_model(
        tmp_path / "outside",
        llama(9),
        llama_config() | {"eos_token_id": 3},
        side_files={
            "tokenizer.json": json.dumps(bpe(["</s>", *WORDS])),
            "tokenizer_config.json": '{"eos_token": "</s>"}',
        },
    )
    found = merge(recipe(paths, tokenizer_source=str(outside)), tmp_path / "out")
    first, second = (load_file(path / "model.safetensors")[EMBEDDING] for path in paths)
    assert torch.equal(read_model(found.out)[EMBEDDING][1:29], (first + second)[:28] / 2)
    assert json.loads((found.out / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}


def test_the_list_of_changes(tmp_path: Path) -> None:
    paths = write(tmp_path, A, B)
    found = merge(recipe(paths, tokenizer_source="union"), tmp_path / "out")
    listed = json.loads((found.out / "merge.vocabulary.json").read_text())
    rows = {entry["token"]: entry for entry in listed["changed"] if entry["token"] is not None}
    assert rows["new"] == {
        "row": 30,
        "token": "new",
        "from": {
            str(paths[0]): {"made": "copy", "of": [{"model": str(paths[1]), "row": 20}]},
            str(paths[1]): {"row": 20},
        },
        "new": True,
    }
    assert rows["<s>"]["from"][str(paths[1])] == {"row": 22}
    assert "w3" not in rows
    assert "merge.vocabulary.json" in {entry["file"] for entry in found.record["outputs"]}
    # it describes this output only
    again = merge(make_recipe("passthrough", [found.out]), tmp_path / "again").out
    assert not (again / "merge.vocabulary.json").exists()


def test_a_base_and_a_chat_model(tmp_path: Path) -> None:
    """The template comes with the token that ends a turn, and generation stops there."""
    base, chat = write(tmp_path, A, bpe(WORDS, ["<s>", "</s>", "<|im_end|>"]))
    (base / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "added_tokens_decoder": {"29": {"content": "</s>"}}}'
    )
    (chat / "chat_template.jinja").write_text("{{ messages }}<|im_end|>")
    found = merge(recipe([base, chat], tokenizer_source="union"), tmp_path / "out")
    assert (found.out / "chat_template.jinja").read_text() == "{{ messages }}<|im_end|>"
    assert json.loads((found.out / "generation_config.json").read_text())["eos_token_id"] == [29, 30]
    decoder = json.loads((found.out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert (decoder["29"]["content"], decoder["30"]["content"], decoder["30"]["special"]) == (
        "</s>",
        "<|im_end|>",
        True,
    )


def test_ids_of_special_tokens_follow(tmp_path: Path) -> None:
    """Also where the tokenizer comes from a folder that names none."""
    paths = write(tmp_path, A, A)
    config = json.loads((paths[0] / "config.json").read_text())
    ids = {"bos_token_id": 28, "eos_token_id": [29], "image_token_index": 3, "pad_token_id": 31}
    (paths[0] / "config.json").write_text(json.dumps(config | ids | {"text_config": {"decoder_start_token_id": 4}}))
    (paths[0] / "generation_config.json").write_text('{"eos_token_id": [29, 27], "suppress_token_ids": [0]}')
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tokenizer.json").write_text(json.dumps(bpe(WORDS[:27][::-1], ["</s>", "<s>"])))
    out = merge(recipe(paths, tokenizer_source=str(outside)), tmp_path / "out").out
    found = json.loads((out / "config.json").read_text())
    assert {key: found[key] for key in ids} == {
        "bos_token_id": 28,
        "eos_token_id": [27],
        "image_token_index": 23,
        "pad_token_id": 31,
    }
    assert found["text_config"]["decoder_start_token_id"] == 22
    generation = json.loads((out / "generation_config.json").read_text())
    # w27 is no longer a token
    assert generation == {"eos_token_id": [27], "suppress_token_ids": [26]}


def test_files_without_the_new_tokens_are_left_out(tmp_path: Path) -> None:
    paths = write(tmp_path, A, B)
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (paths[0] / name).write_text("{}")
    found = merge(recipe(paths, tokenizer_source="union"), tmp_path / "out")
    assert not {"vocab.json", "merges.txt", "tokenizer.model"} & {file.name for file in found.out.iterdir()}
    said = "merges.txt, tokenizer.model, vocab.json: without the new tokens, so left out; tokenizer.json has them all"
    assert said in found.record["warnings"]


def test_an_axis_that_is_not_known(tmp_path: Path) -> None:
    paths = [model(tmp_path / f"m{i}", i, d, rows=33) for i, d in enumerate((A, PERMUTED))]
    for path in paths:
        tensors = load_file(path / "model.safetensors") | {"final_logits_bias": torch.zeros(1, 33)}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UnsupportedError, match="final_logits_bias may be indexed by tokens in a way that is not known here"
    ):
        plan(recipe(paths, tokenizer_source="base"))


def test_models_of_other_widths(tmp_path: Path) -> None:
    paths = [model(tmp_path / "a", 0, A), model(tmp_path / "b", 1, B, hidden=8)]
    with pytest.raises(CheckpointError, match="only models of one width can be merged"):
        plan(recipe(paths, tokenizer_source="union"))


def test_lengths_as_transformers_writes_them(tmp_path: Path) -> None:
    paths = write(tmp_path, A, PERMUTED)
    (paths[1] / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert plan(recipe(paths, tokenizer_source="base")).vocabulary is not None


def test_equal_vocabularies_change_nothing(tmp_path: Path) -> None:
    paths = write(tmp_path, A, json.loads(json.dumps(A)) | {"truncation": None})
    found = plan(recipe(paths, tokenizer_source="union"))
    assert found.vocabulary is None
    assert all(tensor.source is None for each in found.tensors for tensor in each.inputs)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_blocks_do_not_matter(tmp_path: Path, threads: int) -> None:
    """Rows are summed in the same order however the tensor is cut."""
    paths = write(tmp_path, A, B, C)
    found = read_model(merge(recipe(paths, tokenizer_source="union"), tmp_path / "out", threads=threads).out)
    wanted = read_model(merge(recipe(paths, tokenizer_source="union"), tmp_path / "one", threads=1).out)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_slices_need_only_the_tokens_of_their_ends(tmp_path: Path) -> None:
    paths = write(tmp_path, A, PERMUTED, None)
    ranges = [(paths[0], [0, 1]), (paths[2], [0, 2]), (paths[1], [1, 2])]
    slices = [{"sources": [{"model": str(path), "layer_range": layers}]} for path, layers in ranges]
    found = merge({"merge_method": "passthrough", "slices": slices, "tokenizer_source": "base"}, tmp_path / "out")
    merged = read_model(found.out)
    assert torch.equal(merged[EMBEDDING], load_file(paths[0] / "model.safetensors")[EMBEDDING])
    assert torch.equal(merged[HEAD][0], load_file(paths[1] / "model.safetensors")[HEAD][27])


PIECES = {
    "added_tokens": [],
    "model": {"type": "Unigram", "vocab": [[f"▁{word}", -1.0] for word in WORDS]},
}
REFUSED: list[tuple[Any, dict[str, Any], type[MergeError], str]] = [
    (PIECES, {}, UnsupportedError, "spell their tokens in different ways (model.type is Unigram, not BPE)"),
    (
        B | {"pre_tokenizer": {"type": "Metaspace"}},
        {},
        UnsupportedError,
        "spell their tokens in different ways (pre_tokenizer is {'type': 'Metaspace'}, not None)",
    ),
    (None, {}, UnsupportedError, "is not known (no file of its tokenizer holds one)"),
    ('{"model": {"vocab"', {}, CheckpointError, "is not valid JSON"),
    ('{"model": {"vocab": {"x": 0, "x": 1}}}', {}, CheckpointError, "'x' appears twice"),
    ({"model": {"type": "BPE"}}, {}, CheckpointError, "has no model.vocab"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}, {}, CheckpointError, "id 0 has two tokens, 'a' and 'b'"),
    (
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{"id": 3, "content": "a"}]},
        {},
        CheckpointError,
        "token 'a' has two ids, 0 and 3",
    ),
    (
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}},
        {},
        CheckpointError,
        "model.merges must hold pairs of tokens, found 'a b c'",
    ),
    ({"model": {"type": "Other", "vocab": {"a": 0}}}, {}, CheckpointError, "model.type 'Other' is not known"),
    (
        B,
        {"tokens": {"new": {"source": "m0"}}},
        RecipeError,
        "m0 has no token 'new'",
    ),
    (
        B,
        {"tokens": {"new": {"source": {"kind": "model_token", "model": "m1", "token_id": 32}}}},
        RecipeError,
        "row 32 is after the last of the 32 rows of m1",
    ),
    (
        B,
        {"tokens": {"new": {"source": {"kind": "model_token", "model": "m1", "token": "w33"}}}},
        RecipeError,
        "m1 has no token 'w33'. Did you mean 'w3'?",
    ),
    (B, {"tokens": {"absent": {"source": "m1"}}}, RecipeError, "m1 has no token 'absent'"),
]


@pytest.mark.parametrize(("other", "tokenizer", "kind", "message"), REFUSED)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: Any,
    tokenizer: dict[str, Any],
    kind: type[MergeError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, A, None)
    if other is not None:
        Path("m1/tokenizer.json").write_text(other if isinstance(other, str) else json.dumps(other))
    with pytest.raises(MergeError) as caught:
        merge(recipe([Path("m0"), Path("m1")], tokenizer={"source": "union", **tokenizer}), "out")
    assert message in str(caught.value)
    assert type(caught.value) is kind
    assert not Path("out").exists()


def test_tokens_behind_the_rows_of_the_model(tmp_path: Path) -> None:
    """They have no row to give; the union does not list them."""
    many = bpe(WORDS, ["<s>", "</s>", "<a>", "<b>", "<c>"])
    paths = write(tmp_path, A, many)
    found = merge(recipe(paths, tokenizer_source="union"), tmp_path / "out")
    assert "<b>" in tokens_of(json.loads((found.out / "tokenizer.json").read_text()))
    assert "<c>" not in tokens_of(json.loads((found.out / "tokenizer.json").read_text()))
    with pytest.raises(CheckpointError, match="1 token after the last of the 32 rows"):
        plan(recipe(paths, tokenizer_source=str(paths[1])))


def test_gaps_between_ids(tmp_path: Path) -> None:
    gapped = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 12, "content": "<s>"}]}
    other = {"model": {"type": "BPE", "vocab": {"b": 0, "c": 1}}, "added_tokens": []}
    paths = write(tmp_path, gapped, other)
    found = merge(recipe(paths, tokenizer_source="union"), tmp_path / "out")
    written = json.loads((found.out / "tokenizer.json").read_text())
    # programs number added tokens anew unless they stand in the vocabulary
    assert written["model"]["vocab"] == {"a": 0, "b": 7, "<s>": 12, "c": 13}
    first, second = (load_file(path / "model.safetensors")[EMBEDDING] for path in paths)
    merged = read_model(found.out)[EMBEDDING]
    assert torch.equal(merged[7], (first[7] + second[0]) / 2)
    assert torch.equal(merged[5], (first[5] + second[5]) / 2)


def test_a_model_without_a_tokenizer_counts_as_having_the_chosen_one(tmp_path: Path) -> None:
    paths = write(tmp_path, A, PERMUTED, None)
    [warning] = [w for w in plan(recipe(paths, tokenizer_source="base")).warnings if "taken for" in w]
    assert warning == (
        f"the vocabulary of {paths[2]} is not known (no file of its tokenizer holds one); taken for that of {paths[0]}"
    )
    other = model(tmp_path / "more", 5, None, rows=40)
    with pytest.raises(CheckpointError, match="has 40 rows, not as many as"):
        plan(recipe([*paths, other], tokenizer_source="base"))
