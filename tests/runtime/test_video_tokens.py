"""Frames that are joined within an encoder (TempMe), and features merged behind it (AIM, HoliTom)."""

import pytest
import torch

from merganser.errors import ParameterError, UnsupportedError
from merganser.runtime import aim, holitom, merge_frames, merge_tokens
from merganser.runtime.tokens.holitom import segments
from merganser.runtime.tokens.tempme import FrameMerging
from tests.reference import aim_tokens as aim_reference
from tests.reference import holitom as holitom_reference
from tests.reference import tempme as tempme_reference
from tests.runtime.test_tokens import images, pooled, vision


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "keep"), [(16, 0.25), (15, 0.3), (15, 0.01), (7, 1.0)])
def test_aim(tokens, keep):
    given = features(2, tokens, 6)
    found = aim(given, keep)
    least = max(1, -int(-tokens * keep // 1))
    assert found.features.shape == (2, least, 6)
    for row in range(2):
        expected, groups = aim_reference.aim(list(given[row].double()), least)
        torch.testing.assert_close(found.features[row], torch.stack(expected).float())
        assert found.sizes[row].tolist() == [len(group) for group in groups]
        assert all(place in group for place, group in zip(found.places[row].tolist(), groups, strict=True))
    assert found.sizes.sum(1).tolist() == [tokens] * 2
    assert bool((found.places.diff(dim=1) > 0).all())


@pytest.mark.parametrize("seed", range(4))
def test_the_segments_save_most(seed):
    same = features(5, 4, seed=seed) > -0.3
    frames = [[torch.tensor([1.0, 0.0])] * 4]
    for row in same:
        # a place that is not the same turns by a right angle
        frames.append(
            [v if s else torch.tensor([-float(v[1]), float(v[0])]) for v, s in zip(frames[-1], row, strict=True)]
        )
    found, count = segments(same)
    assert count == holitom_reference.saved(frames, found, 0.5)
    assert count == max(holitom_reference.saved(frames, each, 0.5) for each in holitom_reference.cuts(6))
    assert [frame for first, last in found for frame in range(first, last + 1)] == list(range(6))


def video():
    """Six frames of 9 tokens: places 0 to 5 hardly change over the first four, the others do."""
    given = features(6, 9, 8)
    given[1:4, :6] = given[0, :6] + 0.05 * features(3, 6, 8, seed=1)
    return given


def test_holitom():
    given = video()
    found = holitom(given, 0.4, neighbours=3)
    assert found.segments == ((0, 3), (4, 4), (5, 5))
    share = 0.4 * 54 / (54 - 18)
    expected = []
    frames = given.double()
    for first, last in found.segments:
        still = holitom_reference.static(frames, first, last, 0.8)
        for frame in range(first, last + 1):
            moving = [place for place in range(9) if place not in still]
            count = -int(-len(moving) * share // 1)
            centres, means, sizes = holitom_reference.clustered([frames[frame, p] for p in moving], count, 3)
            expected += [(frame, moving[c], m, s) for c, m, s in zip(centres, means, sizes, strict=True)]
        if still:
            means = [frames[first : last + 1, place].mean(0) for place in still]
            centres, means, sizes = holitom_reference.clustered(means, round(len(still) * share), 3)
            every = zip(centres, means, sizes, strict=True)
            expected += [(first, still[c], m, s * (last - first + 1)) for c, m, s in every]
    expected.sort(key=lambda each: each[:2])
    assert list(zip(found.frames.tolist(), found.places.tolist(), strict=True)) == [each[:2] for each in expected]
    torch.testing.assert_close(
        found.features, torch.stack([each[2] for each in expected]).float(), rtol=1e-4, atol=1e-5
    )
    assert found.sizes.tolist() == [each[3] for each in expected]
    assert found.sizes.sum() == 54


def test_holitom_keeps_what_is_attended():
    given, attention = features(2, 10, 8), features(2, 10, seed=2)
    found = holitom(given, 0.3, similarity=1.0, attention=attention)
    best = [sorted(attention[frame].topk(3).indices.tolist()) for frame in range(2)]
    assert found.places.reshape(2, 3).tolist() == best
    assert torch.equal(found.features[:3], given[0, best[0]])
    half = holitom(given, 0.4, similarity=1.0, attention=attention, merged=0.5)
    assert half.sizes.sum() == 20
    for frame in range(2):
        own = half.frames == frame
        kept = set(half.places[own & (half.sizes == 1)].tolist())
        assert set(attention[frame].topk(2).indices.tolist()) <= kept
        assert own.sum() == 4


def test_holitom_at_its_ends():
    given = video()
    whole = holitom(given, 1.0, similarity=1.0)
    torch.testing.assert_close(whole.features, given.flatten(0, 1))
    one = given[:1].expand(5, -1, -1)
    found = holitom(one, 1.0, similarity=0.99)
    assert found.segments == ((0, 4),)
    torch.testing.assert_close(found.features, given[0])
    assert found.sizes.tolist() == [5] * 9
    # what stays the same is never lost altogether
    assert holitom(one, 0.001, similarity=0.99).sizes.tolist() == [45]
    # equal tokens are told apart by place
    assert holitom(torch.ones(2, 6, 4), 0.5, similarity=1.0).sizes.sum() == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aim(torch.zeros(3, 4)), "features: must have the shape [images, tokens, d], not [3, 4]"),
        (lambda: aim(torch.zeros(1, 3, 4), 0), "keep: must be a share above 0 and up to 1, not 0"),
        (lambda: aim(torch.zeros(1, 3, 4), True), "keep: must be a share above 0 and up to 1, not True"),
        (lambda: holitom(torch.zeros(3, 4)), "features: must have the shape [frames, tokens, d], not [3, 4]"),
        (lambda: holitom(torch.zeros(0, 3, 4)), "features: must have the shape [frames, tokens, d], not [0, 3, 4]"),
        (lambda: holitom(torch.ones(2, 3, 4), 0), "keep: must be a share above 0 and up to 1, not 0"),
        (lambda: holitom(torch.ones(2, 3, 4), similarity=2), "similarity: must be a cosine from -1 to 1, not 2"),
        (lambda: holitom(torch.ones(2, 3, 4), neighbours=0), "neighbours: must be a whole number of at least 1, not 0"),
        (lambda: holitom(torch.ones(2, 3, 4), merged=0.5), "merged: says what is merged beside attended tokens"),
        (
            lambda: holitom(torch.ones(2, 3, 4), attention=torch.ones(3, 2)),
            "attention: must have the shape [2, 3] of frames and tokens, not [3, 2]",
        ),
    ],
)
def test_features_are_checked(call, message):
    with pytest.raises(ParameterError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("first", [0, 1])
def test_tempme(first):
    hidden, metric = features(4, 6 + first, 5), features(2, 12 + 2 * first, 3, seed=4)
    if first:
        # class tokens that are like a patch of the other frame: nothing may go into them
        hidden[1::2, 0] = hidden[::2, 1]
    merging = FrameMerging(4, {0: 2}, 0.3, 0.2, 0, (first, 1))
    merging.begin(hidden)
    merging.sizes = torch.randint(1, 4, hidden.shape[:2], generator=torch.Generator().manual_seed(1)).float()
    rows = [
        [(v.double(), int(s)) for v, s in zip(*each, strict=True)] for each in zip(hidden, merging.sizes, strict=True)
    ]
    clips = tempme_reference.joined([(row[:first], row[first:]) for row in rows], 2)
    across = int((12 + 2 * first) * 0.3)
    clips = [tempme_reference.merged(clip, [v for v, _ in clip[1]], across) for clip in clips]
    found = merging.enter(hidden)
    left = 12 + 2 * first - across
    metric = metric[:, :left]
    assert found.shape == (2, left, 5)
    for stage in range(2):
        for row, (classes, patches) in enumerate(clips):
            torch.testing.assert_close(found[row], torch.stack([v for v, _ in [*classes, *patches]]).float())
            assert merging.sizes[row].tolist() == [s for _, s in [*classes, *patches]]
        if stage == 0:
            found = merging.merge(found, metric)
            own = [list(each[2 * first :].double()) for each in metric]
            clips = [tempme_reference.merged(c, m, int(left * 0.2)) for c, m in zip(clips, own, strict=True)]
    assert (merging.clips, merging.counts) == ([2], [left - int(left * 0.2)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["clip", "clip_projection", "siglip"])
def test_videos(kind, attention):
    made, tokens = vision(kind, attention)
    given = images(8)
    with merge_frames(made, frames=4, joins={1: 2, 2: 2}, r=1) as merging:
        found = made(given)
        alone = made(given[:4])
    assert merging.clips == [4, 2, 1]
    assert merging.sizes.sum(1).tolist() == [4 * tokens]
    assert pooled(found).shape == (2, 32) if kind != "clip_projection" else len(pooled(found)) == 2
    torch.testing.assert_close(pooled(found)[:1], pooled(alone), rtol=1e-3, atol=1e-4)
    assert found.last_hidden_state.shape[1] == merging.counts[-1] < 4 * tokens
    if kind == "clip":
        classes = found.last_hidden_state[:, :4]
        torch.testing.assert_close(pooled(found), getattr(made, "vision_model", made).post_layernorm(classes).mean(1))
    # and nothing is left behind
    before = pooled(made(given))
    assert len(before) == 8
    assert all("forward" not in layer.__dict__ for layer in (getattr(made, "vision_model", made)).encoder.layers)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_video_of_one_image(kind):
    """Frames that are all equal, joined without merging, say what the image says."""
    made, _ = vision(kind)
    image = images(1)
    expected = pooled(made(image))
    with merge_frames(made, frames=3, joins={1: 3}, across=0, within=0, r=0):
        found = pooled(made(image.expand(3, -1, -1, -1)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_options_are_checked():
    made, _ = vision("clip")
    for options, message in [
        ({"frames": 1, "joins": {0: 2}}, "frames: must be a whole number of at least 2, not 1"),
        ({"frames": 4}, "joins: give the layers that join clips"),
        ({"frames": 12}, "joins: give the layers that join clips"),
        ({"frames": 4, "joins": {}}, "joins: must say for at least one layer"),
        ({"frames": 4, "joins": {3: 2}}, "joins: there is no layer 3; the encoder has 3"),
        ({"frames": 4, "joins": {1: 1}}, "joins: layer 1: must be a whole number of at least 2, not 1"),
        ({"frames": 4, "joins": {1: 3}}, "joins: 4 frames cannot be joined by 3"),
        ({"frames": 4, "joins": {1: 2}, "across": 0.6}, "across: must be a share from 0 to 0.5, not 0.6"),
        ({"frames": 4, "joins": {1: 2}, "within": "all"}, "within: must be a share from 0 to 0.5, not 'all'"),
        ({"frames": 4, "joins": {1: 2}, "r": -1}, "r: must be a whole number of at least 0, not -1"),
    ]:
        with pytest.raises(ParameterError) as error, merge_frames(made, **options):
            pass
        assert message in str(error.value)
    with (
        merge_frames(made, frames=4, joins={1: 2}),
        pytest.raises(UnsupportedError, match="6 images are not videos of 4"),
    ):
        made(images(6))
    with pytest.raises(UnsupportedError, match="class Linear are not supported"):
        merge_frames(torch.nn.Linear(1, 1), frames=4, joins={0: 2}).__enter__()
    for name, where in [("tempme", "merge_frames"), ("aim", r"aim\(features\)"), ("holitom", r"holitom\(features\)")]:
        with pytest.raises(ParameterError, match=where):
            merge_tokens(made, name, r=1).__enter__()
