"""Tokens of vision encoders: the choice against transcriptions, and the laws within models."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from merganser.errors import ParameterError, UnsupportedError
from merganser.runtime import merge_tokens
from merganser.runtime.tokens.encoder import TokenMerging
from merganser.runtime.tokens.pitome import pitome
from merganser.runtime.tokens.plan import Plan
from merganser.runtime.tokens.tome import tome
from tests.reference import pitome as pitome_reference
from tests.reference import tome as tome_reference

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
VISION = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, 17),
    "clip_projection": (CLIPVisionModelWithProjection, CLIPVisionConfig, 17),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, 16),
}


def vision(kind, attention="sdpa"):
    architecture, config, tokens = VISION[kind]
    torch.manual_seed(0)
    made = architecture(config(**SIZES)).eval()
    # fresh weights are so small that layers do next to nothing
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.set_attn_implementation(attention)
    return made, tokens


def images(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def pooled(output):
    if isinstance(output, torch.Tensor):
        # transformers 4 returns the features of a whole model alone
        return output
    return output.image_embeds if "image_embeds" in output else output.pooler_output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["tome", "pitome"])
@pytest.mark.parametrize("kind", VISION)
def test_nothing_merged_nothing_changed(kind, method, attention):
    made, tokens = vision(kind, attention)
    expected = made(images())
    for options in ({"r": 0}, {"ratio": 1.0}):
        with merge_tokens(made, method, **options) as merging:
            found = made(images())
        assert torch.equal(pooled(found), pooled(expected))
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert merging.counts == [tokens] * 3


@pytest.mark.parametrize("options", [{"r": 3}, {"r": [5, 0, 2]}, {"ratio": 0.7}, {"r": 100}], ids=str)
@pytest.mark.parametrize("method", ["tome", "pitome"])
@pytest.mark.parametrize("kind", VISION)
def test_sizes_add_up(kind, method, options):
    made, tokens = vision(kind)
    with merge_tokens(made, method, **options) as merging:
        found = made(images())
    assert merging.sizes.sum(1).tolist() == [tokens] * 2
    assert merging.sizes.shape == found.last_hidden_state.shape[:2]
    assert merging.counts[-1] == merging.sizes.shape[1]
    if options == {"r": 3}:
        assert merging.counts == [tokens - 3, tokens - 6, tokens - 9] if tokens == 17 else [13, 10, 7]
    if options == {"r": [5, 0, 2]}:
        assert merging.counts == [tokens - 5, tokens - 5, tokens - 7]
    if options == {"r": 100}:
        assert merging.counts == ([9, 5, 3] if tokens == 17 else [8, 4, 2])
    if kind != "siglip":
        assert merging.sizes[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["tome", "pitome"])
@pytest.mark.parametrize("kind", VISION)
def test_equal_patches_merge_without_a_trace(kind, method, attention):
    """Every patch is there several times: attention must count merged ones as often."""
    made, _ = vision(kind, attention)
    module = made.vision_model if hasattr(made, "vision_model") else made
    torch.nn.init.zeros_(module.embeddings.position_embedding.weight)
    # the left half of an image is one patch, repeated; the right half another
    image = images(2)[:, :, :4, :4].repeat(1, 1, 4, 2)
    image = torch.cat((image, images(2)[:, :, 4:8, 4:8].repeat(1, 1, 4, 2)), dim=3)
    expected = pooled(made(image))
    with merge_tokens(made, method, r=[4, 2, 0]) as merging:
        found = pooled(made(image))
    assert merging.sizes.max() > 1
    # float32 through three layers of large weights, with sums in another order
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("first", [0, 1])
def test_choice(first):
    metric = torch.randn(3, 15, 8, generator=torch.Generator().manual_seed(2))
    for choose, expected in [
        (tome, lambda each: tome_reference.tome(each, 4, first)),
        (pitome, lambda each: pitome_reference.pitome(each, 4, first, 0.9 - 0.9 * 0.5)),
    ]:
        gone, into = choose(metric, 4, first, 0.5)
        for row in range(3):
            pairs = set(zip(gone[row].tolist(), into[row].tolist(), strict=True))
            assert pairs == expected(metric[row].double())


def test_means():
    generator = torch.Generator().manual_seed(3)
    hidden, metric = torch.randn(2, 11, 6, generator=generator), torch.randn(2, 11, 4, generator=generator)
    merging = TokenMerging(tome, Plan(3, None, 1), 1, 1)
    merging.begin(hidden)
    merging.sizes = torch.randint(1, 5, (2, 11), generator=generator).float()
    sizes = merging.sizes
    found = merging.merge(hidden, metric)
    for row in range(2):
        pairs = tome_reference.tome(metric[row].double(), 3, True)
        expected = tome_reference.merged(hidden[row].double(), sizes[row].tolist(), pairs)
        torch.testing.assert_close(found[row], torch.stack([mean for mean, _ in expected]).float())
        assert merging.sizes[row].tolist() == [size for _, size in expected]


def test_whole_models_and_what_is_left_behind():
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    for architecture, config in ((CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)):
        made = architecture(config(text_config=text, vision_config=SIZES)).eval()
        before = pooled(made.get_image_features(images()))
        with merge_tokens(made, r=3) as merging:
            assert not torch.equal(pooled(made.get_image_features(images())), before)
            with pytest.raises(UnsupportedError, match="changed already"), merge_tokens(made, r=1):
                pass
        assert len(merging.counts) == 3
        assert torch.equal(pooled(made.get_image_features(images())), before)
        assert all("forward" not in layer.__dict__ for layer in made.vision_model.encoder.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tomes", "r": 1}, "'tomes' merges no tokens. Did you mean 'tome'?"),
        ({}, "r, ratio: give one of the two"),
        ({"r": 1, "ratio": 0.5}, "r, ratio: give one of the two"),
        ({"r": -1}, "r: must be a whole number of at least 0"),
        ({"r": [1, 2]}, "the encoder has 3 layers, and 2 numbers were given"),
        ({"r": 2.5}, "r: must be a whole number of at least 0, or one per layer, not 2.5"),
        ({"r": [1, 2, 0.5]}, "r: must be a whole number of at least 0, or one per layer"),
        ({"ratio": 0}, "ratio: must be a share above 0 and up to 1, not 0"),
        ({"ratio": 1.5}, "ratio: must be a share above 0 and up to 1, not 1.5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ParameterError) as error, merge_tokens(vision("clip")[0], **options):
        pass
    assert message in str(error.value)


def test_models_are_checked():
    other = SiglipForImageClassification(SiglipConfig(vision_config=SIZES, text_config={"num_hidden_layers": 1}))
    with pytest.raises(UnsupportedError, match="class SiglipForImageClassification are not supported; CLIPModel,"):
        merge_tokens(other, r=1).__enter__()
    made, _ = vision("clip")
    made.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="attention 'flash_attention_2' is not supported"):
        merge_tokens(made, r=1).__enter__()
