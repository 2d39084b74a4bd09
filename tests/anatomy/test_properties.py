"""Whatever the names, shapes and config are, the anatomy covers them and nothing fails."""

import contextlib
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.anatomy import infer_anatomy, is_tied, set_config_dtype, set_tied, slice_config
from merganser.anatomy.settings import by_layer
from merganser.anatomy.settings.config import layer_counts
from merganser.anatomy.settings.refit import RULE_KEYS
from merganser.errors import MergeError

WORDS = [
    "model",
    "layers",
    "h",
    "block",
    "mlp",
    "experts",
    "self_attn",
    "A_log",
    "visual",
    "encoder",
    "decoder",
    "weight",
]
component = st.one_of(
    st.sampled_from(WORDS), st.integers(0, 4).map(str), st.text(string.ascii_letters + "0._²", max_size=4)
)
name = st.lists(component, max_size=6).map(".".join)
shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 6), st.text(max_size=3), st.lists(st.integers(0, 4), max_size=4)
)
key = st.sampled_from(
    """num_hidden_layers n_layer model_type layer_types mlp_only_layers full_attn_idxs tie_word_embeddings vocab_size
    max_window_layers use_sliding_window sliding_window sliding_window_pattern full_attention_interval block_types
    decoder_sparse_step first_k_dense_replace moe_layer_freq attn_layer_period attn_layer_offset attention_types
    num_nextn_predict_layers no_rope_layer_interval hybrid_override_pattern dtype is_encoder_decoder
    architectures""".split()  # noqa: SIM905 (a table)
)
model_type = st.sampled_from(["gemma2", "llama4_text", "smollm3", "modernbert", "lfm2", "whisper"])
flat = st.builds(lambda kind, rest: {"model_type": kind, **rest}, model_type, st.dictionaries(key, leaf, max_size=6))
config = st.one_of(flat, st.builds(lambda outer, inner: {**outer, "text_config": inner}, flat, flat))
checkpoint = st.dictionaries(name, shape, max_size=12)
layered = st.builds(
    lambda count, suffixes, rest: {f"model.layers.{i}.{s}": (2, 2) for i in range(count) for s in suffixes} | rest,
    st.integers(1, 4),
    st.lists(name, min_size=1, max_size=4, unique=True),
    checkpoint,
)


@given(st.one_of(checkpoint, layered), config)
@settings(max_examples=150, deadline=None)
def test_parts_cover_all_names(shapes, config):
    anatomy = infer_anatomy(shapes, config)
    assert list(anatomy.parts) == list(shapes)
    for tensor, part in anatomy.parts.items():
        assert part.name == tensor
        assert (part.stack is None) <= (part.layer is None)
        assert (part.position == "layer") <= (part.layer is not None)
        depth = anatomy.depth(tensor)
        assert depth is None or 0 <= depth <= 1
    for alias, source in anatomy.tied:
        assert alias not in shapes
        assert source in shapes
    assert anatomy.embedding is None or anatomy.embedding in shapes
    assert anatomy.head is None or anatomy.head in shapes
    assert anatomy.main is None or anatomy.stacks[anatomy.main] == anatomy.n_layers


@given(st.one_of(checkpoint, layered), config, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_rename_is_undone_by_renaming_back(shapes, config, index):
    anatomy = infer_anatomy(shapes, config)
    for tensor, part in anatomy.parts.items():
        renamed = anatomy.rename_layer(tensor, index)
        if part.layer is None:
            assert renamed == tensor
            continue
        again = infer_anatomy({renamed: shapes[tensor], **shapes}, config)
        if renamed in again.parts and again.parts[renamed].stack == part.stack and index < again.stacks[part.stack]:
            assert again.parts[renamed].layer == index
            assert again.rename_layer(renamed, part.layer) == tensor
        others = {anatomy.rename_layer(other, index) for other in shapes if other != tensor}
        same_place = {anatomy.rename_layer(other, part.layer) for other in shapes if other != tensor}
        assert (renamed in others) == (tensor in same_place)


@given(st.integers(1, 5), st.permutations(range(5)), st.lists(name, min_size=1, max_size=4, unique=True))
@settings(deadline=None)
def test_a_permutation_of_layers_is_undone_by_its_inverse(count, order, suffixes):
    order = [index for index in order if index < count]
    shapes = {f"model.layers.{i}.{s}.weight": (i + 1,) for i in range(count) for s in suffixes}
    anatomy = infer_anatomy(shapes, {})
    moved = {anatomy.rename_layer(n, order[anatomy.parts[n].layer]): shape for n, shape in shapes.items()}
    assert set(moved) == set(shapes)
    back = infer_anatomy(moved, {})
    inverse = [order.index(index) for index in range(count)]
    assert {back.rename_layer(n, inverse[back.parts[n].layer]): shape for n, shape in moved.items()} == shapes


@given(layered, config, st.lists(st.integers(0, 3), max_size=5))
@settings(max_examples=150, deadline=None)
def test_slicing_any_config_gives_a_config_or_a_reason(shapes, config, layers):
    anatomy = infer_anatomy(shapes, config)
    before = repr(config)
    with contextlib.suppress(MergeError, ValueError):
        sliced = slice_config(config, layers, anatomy=anatomy)
        chose_all = layers == list(range(anatomy.n_layers))
        assert chose_all or len(layers) in layer_counts(sliced.config)
        assert all(isinstance(warning, str) for warning in sliced.warnings)
    assert repr(config) == before


by_layer_key = st.sampled_from(sorted(RULE_KEYS | by_layer._READ | by_layer._PER_LAYER | by_layer._NESTED))
odd_key = st.sampled_from(
    ["per_layer_config", "out_indices", "out_features", "stage_names", "moe_layers_enum", "kda_layers"]
)
by_layer_leaf = st.one_of(
    leaf,
    st.floats(allow_nan=False),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.lists(st.integers(), max_size=1)), min_size=4, max_size=4),
    st.dictionaries(st.one_of(st.integers(0, 5).map(str), st.text(max_size=2), odd_key), leaf, max_size=3),
)


@given(
    st.dictionaries(st.one_of(by_layer_key, odd_key), by_layer_leaf, max_size=6),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_whatever_settings_by_layer_hold_they_are_carried_over_or_refused(settings, layers):
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (2, 2) for index in range(4)}
    config = {**settings, "num_hidden_layers": 4}
    with contextlib.suppress(MergeError):
        sliced = slice_config(config, layers, anatomy=infer_anatomy(shapes, config)).config
        assert sliced["num_hidden_layers"] == len(layers)
        assert sliced.keys() >= config.keys()


@given(config)
def test_dtype_and_ties_of_any_config(config):
    before = repr(config)
    assert is_tied(set_tied(config, True)) is True
    assert is_tied(set_tied(config, False)) is False
    changed = set_config_dtype(config, "bfloat16")
    assert "bfloat16" in (changed.get("dtype"), changed.get("torch_dtype"))
    assert repr(config) == before
