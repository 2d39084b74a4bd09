"""Cells of Qwen-VL's vision encoders: whole, within their windows, and nothing lost."""

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from merganser.errors import UnsupportedError
from merganser.runtime import merge_frames, merge_tokens
from merganser.runtime.tokens.plan import Plan
from merganser.runtime.tokens.qwen import CellMerging, attention, windows
from merganser.runtime.tokens.tome import tome
from tests.reference import tome as tome_reference

SIZES = {"depth": 3, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
# an image of 3 x 5 cells, whose last windows are cut off, and a video of two frames of 2 x 4 cells
GRID = torch.tensor([[1, 6, 10], [2, 4, 8]])
CELLS = 15 + 2 * 8


def vision(kind, implementation="sdpa"):
    torch.manual_seed(0)
    if kind == "qwen2":
        config = Qwen2VLVisionConfig(**SIZES, embed_dim=32, hidden_size=24)
        made = Qwen2VisionTransformerPretrainedModel(config)
    else:
        config = Qwen2_5_VLVisionConfig(
            **SIZES, hidden_size=32, intermediate_size=48, out_hidden_size=24, window_size=16, fullatt_block_indexes=[1]
        )
        made = Qwen2_5_VisionTransformerPretrainedModel(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.set_attn_implementation(implementation)
    return made.eval()


def patches(grid=GRID, seed=0):
    return torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))


def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def encoded(made, grid=GRID, given=None, **options):
    with merge_tokens(made, **options) as merging, torch.no_grad():
        return features(made(patches() if given is None else given, grid_thw=grid)), merging


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5"])
def test_nothing_merged_nothing_changed(kind, implementation):
    made = vision(kind, implementation)
    with torch.no_grad():
        expected = features(made(patches(), grid_thw=GRID))
    found, merging = encoded(made, r=0)
    assert torch.equal(found, expected)
    assert (merging.counts, merging.places.tolist()) == ([CELLS] * 3, list(range(CELLS)))
    # and nothing is left behind
    encoded(made, r=1)
    with torch.no_grad():
        assert torch.equal(features(made(patches(), grid_thw=GRID)), expected)


@pytest.mark.parametrize("method", ["tome", "pitome"])
@pytest.mark.parametrize(("kind", "side"), [("qwen2", None), ("qwen2_5", 2)])
def test_sizes_add_up_in_every_window(kind, side, method):
    made = vision(kind)
    found, merging = encoded(made, method=method, ratio=0.7)
    assert found.shape == (merging.counts[-1], 24)
    assert found.isfinite().all()
    assert merging.counts == sorted(merging.counts, reverse=True)
    assert merging.counts[-1] < CELLS
    assert bool((merging.places.diff() > 0).all())
    window = windows(GRID, 2, side)
    left = torch.zeros(int(window.max()) + 1).index_add(0, window[merging.places], merging.sizes)
    assert torch.equal(left, window.bincount().float())


def test_windows():
    found = windows(torch.tensor([[1, 6, 10], [2, 4, 4]]), 2, 2)
    image = [*[0, 0, 1, 1, 2], *[0, 0, 1, 1, 2], *[3, 3, 4, 4, 5]]
    assert found.tolist() == [*image, *[6] * 4, *[7] * 4]
    assert windows(torch.tensor([[2, 4, 4]]), 2, None).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5"])
def test_images_do_not_depend_on_each_other(kind):
    made, given = vision(kind), patches()
    both, merging = encoded(made, r=[1, 1, 0])
    for number, (grid, first, rows) in enumerate([(GRID[:1], 0, slice(0, 60)), (GRID[1:], 15, slice(60, None))]):
        alone, own = encoded(made, grid, given[rows], r=[1, 1, 0])
        mine = merging.places >= 15 if number else merging.places < 15
        assert (merging.places[mine] - first).tolist() == own.places.tolist()
        assert torch.equal(merging.sizes[mine], own.sizes)
        torch.testing.assert_close(both[mine], alone, rtol=1e-4, atol=1e-4)


def test_cells_become_means_of_their_corners():
    made = vision("qwen2")
    merging = CellMerging(tome, Plan(2, None, 3), made)
    merging.begin(torch.tensor([[2, 4, 6]]))
    generator = torch.Generator().manual_seed(1)
    hidden, keys = torch.randn(48, 5, generator=generator), torch.randn(48, 3, generator=generator)
    merging.sizes = torch.randint(1, 4, (12,), generator=generator).float()
    sizes = merging.sizes
    found = merging.merge(hidden, keys).reshape(-1, 20)
    at = 0
    for frame in range(2):
        own = slice(6 * frame, 6 * frame + 6)
        pairs = tome_reference.tome(keys.reshape(12, -1)[own].double(), 2, False)
        expected = tome_reference.merged(hidden.reshape(12, -1)[own].double(), sizes[own].tolist(), pairs)
        for mean, size in expected:
            torch.testing.assert_close(found[at], mean.float())
            assert merging.sizes[at] == size
            at += 1
    assert at == len(found) == 8


def test_a_size_counts_as_often_as_its_cells():
    """Attention with the logarithm of a size is attention to as many equal patches, within the segment."""
    made = vision("qwen2").blocks[0].attn
    generator = torch.Generator().manual_seed(2)
    normed, angles = torch.randn(6, 32, generator=generator), torch.randn(6, 8, generator=generator).repeat(1, 2)
    sizes = torch.tensor([1, 3, 1, 2, 1, 1])
    every = torch.arange(6).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    bounds, all_bounds = torch.tensor([0, 4, 6]), torch.tensor([0, 7, 9])
    with torch.no_grad():
        found = attention(made, normed, bounds, (angles.cos(), angles.sin()), sizes.float().log())
        whole = made(
            normed[every], cu_seqlens=all_bounds, position_embeddings=(angles[every].cos(), angles[every].sin())
        )
    torch.testing.assert_close(found, whole[first], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5"])
def test_equal_cells_merge_without_a_trace(kind):
    """Without positions, cells that are equal say the same when one stands for two, and others attend to it twice."""
    made, grid = vision(kind), torch.tensor([[1, 4, 8]])
    for name, buffer in made.named_buffers():
        if "inv_freq" in name:
            buffer.zero_()
    # each window of 2 x 2 cells has three of one kind, and one of another
    given = patches(grid[:, 1:], seed=3)[:8].unflatten(0, (2, 4))[[0, 0, 0, 0, 1, 0, 1, 0]].flatten(0, 1)
    expected, _ = encoded(made, grid, given, r=0)
    found, merging = encoded(made, grid, given, r=[1, 0, 0])
    assert merging.sizes.max() == 2
    torch.testing.assert_close(found, expected[merging.places], rtol=1e-3, atol=1e-3)


def test_what_is_left_keeps_its_place_and_segment():
    made = vision("qwen2_5")
    merging = CellMerging(tome, Plan(1, None, 3), made)
    merging.begin(torch.tensor([[1, 4, 8]]))
    merging._left, merging.sizes = torch.tensor([0, 2, 3, 5]), torch.ones(4)
    assert merging.bounds(torch.tensor([0, 16, 32])).tolist() == [0, 12, 16]
    assert merging.bounds(torch.tensor([0, 32])).tolist() == [0, 16]
    # a segment of which nothing is left is none
    assert merging.bounds(torch.tensor([0, 4, 8, 32])).tolist() == [0, 4, 16]
    assert merging.patches(torch.arange(32)[:, None]).flatten().tolist() == [0, 1, 2, 3, *range(8, 16), *range(20, 24)]


def test_what_is_refused():
    made = vision("qwen2_5")
    with merge_tokens(made, r=1):
        with pytest.raises(UnsupportedError, match="changed already"), merge_tokens(made, r=1):
            pass
        if not isinstance(made(patches(), grid_thw=GRID), torch.Tensor):
            with pytest.raises(UnsupportedError, match="leave return_dict=False out"):
                made(patches(), grid_thw=GRID, return_dict=False)
    with pytest.raises(UnsupportedError, match="has no place in the prompt of Qwen-VL"):
        merge_frames(made, frames=4, joins={0: 2}).__enter__()
    made.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="attention 'flash_attention_2' is not supported"):
        merge_tokens(made, r=1).__enter__()
