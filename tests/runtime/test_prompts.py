"""Prompts with images, whose tokens are merged: tiny models of transformers, from image to text."""

import inspect

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from merganser.errors import ParameterError, UnsupportedError
from merganser.runtime import aim, holitom, merge_tokens, merged_prompt

IMAGE, VIDEO = 60, 61
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN = {"depth": 3, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
ON = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 58, "vision_end_token_id": 59}
positions_taken = pytest.mark.skipif(
    not hasattr(Qwen2VLForConditionalGeneration, "_prepare_position_ids_for_generation"), reason="transformers 4"
)


def build(kind):
    if kind == "llava":
        text = {**TEXT, "model_type": "llama"}
        vision = CLIPVisionConfig(**TOWER)
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)
        )
    if kind == "qwen2":
        vision = {**QWEN, "embed_dim": 32, "hidden_size": 32}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **ON)
        )
    vision = {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16}
    vision["fullatt_block_indexes"] = [1]
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **ON)
    )


MADE = {}


def model(kind):
    if kind not in MADE:
        torch.manual_seed(0)
        made = build(kind).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = 0
        MADE[kind] = made
    return MADE[kind]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def prompt(*parts):
    return torch.tensor([[token for part in parts for token in part]])


def images(kind):
    """A prompt with two images."""
    if kind == "llava":
        ids = prompt([1, 5], [IMAGE] * 16, [7, 8], [IMAGE] * 16, [9, 10, 11])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": drawn(2, 3, 16, 16)}
    ids = prompt([1, 5, 58], [IMAGE] * 15, [59, 7, 58], [IMAGE] * 8, [59, 9, 10, 11])
    grid = torch.tensor([[1, 6, 10], [1, 4, 8]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid}
    return {**given, "pixel_values": drawn(92, 96), "mm_token_type_ids": (ids == IMAGE).int()}


def video():
    """A prompt with a video of four frames of 2 x 4 cells for Qwen-VL."""
    ids = prompt([1, 5, 58], [VIDEO] * 32, [59, 9, 10, 11])
    given = {"input_ids": ids, "video_grid_thw": torch.tensor([[4, 4, 8]]), "pixel_values_videos": drawn(128, 96)}
    return {**given, "mm_token_type_ids": 2 * (ids == VIDEO).int()}


def said(made, given):
    # transformers 5.2 takes no types of tokens
    given = {key: value for key, value in given.items() if key in inspect.signature(made.forward).parameters}
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = made.generate(**given, **options)
    return found.sequences[0, -6:].tolist(), torch.stack(found.logits)


QWENS = [pytest.param(each, marks=positions_taken) for each in ("qwen2", "qwen2_5")]


@pytest.mark.parametrize("options", [{"method": "aim", "keep": 1.0}, {"method": "tome", "r": 0}])
@pytest.mark.parametrize("kind", ["llava", *QWENS])
def test_nothing_merged_nothing_changed(kind, options):
    made, given = model(kind), images(kind)
    expected, logits = said(made, given)
    found, others = said(made, merged_prompt(made, given, **options))
    assert found == expected
    torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-4)


@positions_taken
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5"])
def test_a_video_of_which_nothing_is_merged(kind):
    made, given = model(kind), video()
    expected = said(made, given)
    found = said(made, merged_prompt(made, given, "aim", keep=1.0))
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"method": "aim", "keep": 0.5}, {"method": "tome", "r": 2}])
def test_llava(options):
    made, given = model("llava"), images("llava")
    merged = merged_prompt(made, given, **options)
    with torch.no_grad():
        if options["method"] == "aim":
            output = made.model.get_image_features(given["pixel_values"])
            every = torch.stack(list(getattr(output, "pooler_output", output)))
            left = aim(every, 0.5).features
        else:
            with merge_tokens(made.model.vision_tower, r=2) as merging:
                output = made.model.get_image_features(given["pixel_values"])
            left = torch.stack(list(getattr(output, "pooler_output", output)))
            # the features are those behind the last layer but one, without the class token
            assert left.shape[1] == merging.counts[1] - 1 == 12
        embedding = made.get_input_embeddings()
        parts = [prompt([1, 5]), left[0], prompt([7, 8]), left[1], prompt([9, 10, 11])]
        expected = torch.cat([embedding(each)[0] if each.dtype == torch.int64 else each for each in parts])
    assert torch.equal(merged["inputs_embeds"][0], expected)
    assert merged["attention_mask"].shape == (1, len(expected))
    assert len(said(made, merged)[0]) == 6


@positions_taken
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5"])
@pytest.mark.parametrize("options", [{"method": "aim", "keep": 0.4}, {"method": "pitome", "r": 1}])
def test_qwen(kind, options):
    made, given = model(kind), images(kind)
    merged = merged_prompt(made, given, **options)
    more = {key: given[key] for key in ("image_grid_thw", "mm_token_type_ids")}
    positions = made.model.get_rope_index(given["input_ids"], **more)[0][:, 0]
    with torch.no_grad():
        if options["method"] == "aim":
            output = made.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
            found = [aim(each[None], 0.4) for each in output.split([15, 8])]
            left, places = (torch.cat([getattr(each, name)[0] for each in found]) for name in ("features", "places"))
            places[len(found[0].places[0]) :] += 15
        else:
            with merge_tokens(made.model.visual, "pitome", r=1) as merging:
                left = made.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
            places = merging.places
    own = (given["input_ids"][0] == IMAGE).nonzero().flatten()
    keep = given["input_ids"][0] != IMAGE
    keep[own[places]] = True
    assert 0 < len(places) < 23
    assert torch.equal(merged["position_ids"][1:, 0], positions[:, keep])
    assert merged["position_ids"][0, 0].tolist() == list(range(int(keep.sum())))
    is_image = given["input_ids"][0, keep] == IMAGE
    assert torch.equal(merged["inputs_embeds"][0, is_image], left)
    # the first generated token goes on from the text
    found = made(**merged).logits[0, -1]
    ran = said(made, merged)
    torch.testing.assert_close(ran[1][0, 0], found, rtol=1e-4, atol=1e-4)
    # and the next one has the next position, in all of its numbers
    token = torch.tensor([[ran[0][0]]])
    longer = torch.cat((merged["inputs_embeds"], made.get_input_embeddings()(token)), dim=1)
    after = torch.cat((merged["position_ids"], merged["position_ids"][..., -1:] + 1), dim=-1)
    second = made(inputs_embeds=longer, position_ids=after).logits[0, -1]
    torch.testing.assert_close(ran[1][1, 0], second, rtol=1e-4, atol=1e-4)


@positions_taken
def test_videos():
    made, given = model("qwen2_5"), video()
    merged = merged_prompt(made, given, "holitom", keep=0.3)
    with torch.no_grad():
        output = made.model.visual(given["pixel_values_videos"], grid_thw=given["video_grid_thw"]).pooler_output
    left = holitom(output.reshape(4, 8, -1), 0.3)
    keep = given["input_ids"][0] != VIDEO
    keep[3 + 8 * left.frames + left.places] = True
    assert torch.equal(merged["inputs_embeds"][0, given["input_ids"][0, keep] == VIDEO], left.features)
    more = {key: given[key] for key in ("video_grid_thw", "mm_token_type_ids")}
    positions = made.model.get_rope_index(given["input_ids"], **more)[0][:, 0]
    assert torch.equal(merged["position_ids"][1:, 0], positions[:, keep])
    framewise = merged_prompt(made, given, "aim", keep=0.25)
    assert framewise["inputs_embeds"].shape[1] == 7 + 4 * 2
    assert len(said(made, merged)[0]) == 6


def changed(kind, **changes):
    return {**images(kind), **changes}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "aims"}, "'aims' merges no tokens of a prompt. Did you mean 'aim'?"),
        ({"method": "tome", "keep": 0.5}, "keep: tome merges within the encoder; give r or ratio"),
        ({"method": "tome"}, "r, ratio: give one of the two"),
        ({"r": 2}, "r, ratio: aim merges behind the encoder; give keep"),
        ({"keep": 2}, "keep: must be a share above 0 and up to 1, not 2"),
        ({"method": "holitom"}, "holitom merges the frames of a video"),
        ({"inputs": {"image_sizes": 3}}, "image_sizes: this input of LlavaForConditionalGeneration is not"),
        (
            {"inputs": {"input_ids": prompt([1, IMAGE, 5]), "attention_mask": None}},
            "has 1 places for features of images, and there are",
        ),
        (
            {"inputs": {"input_ids": prompt([1], [IMAGE] * 34), "attention_mask": None}, "method": "tome", "r": 1},
            "has 34 places for",
        ),
        ({"inputs": {"input_ids": torch.ones(2, 9).long()}}, "input_ids must hold one prompt"),
        ({"inputs": {"attention_mask": torch.zeros(1, 39)}}, "the prompt is padded; give it alone"),
        ({"inputs": {"pixel_values": None}}, "has 32 places for features of images, and there are 0"),
    ],
)
def test_what_is_refused(options, message):
    given = changed("llava", **options.get("inputs", {}))
    options = {key: value for key, value in options.items() if key != "inputs"}
    with pytest.raises((ParameterError, UnsupportedError)) as error:
        merged_prompt(model("llava"), given, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"image_grid_thw": None}, {}, "pixel_values, image_grid_thw: a prompt has both or none"),
        ({}, {"method": "holitom"}, "this prompt has images, too"),
        ({"input_ids": prompt([1, 58], [IMAGE] * 23)}, {}, "the prompt must end with text"),
        (
            {"input_ids": prompt([1, 58], [IMAGE] * 9, [59])},
            {},
            "has 9 places for features of images, and there are 23",
        ),
    ],
)
@positions_taken
def test_what_is_refused_of_qwen(changes, options, message):
    given = changed("qwen2_5", attention_mask=None, **changes)
    with pytest.raises((ParameterError, UnsupportedError)) as error:
        merged_prompt(model("qwen2_5"), given, **options)
    assert message in str(error.value)


def test_other_models():
    with pytest.raises(
        UnsupportedError, match="models of class Linear are not supported; LlavaForConditionalGeneration"
    ):
        merged_prompt(torch.nn.Linear(1, 1), {})
    if not hasattr(Qwen2VLForConditionalGeneration, "_prepare_position_ids_for_generation"):
        with pytest.raises(UnsupportedError, match="from transformers 5 on alone"):
            merged_prompt(model("qwen2"), {"input_ids": prompt([1, 2])})
