"""Every config class of transformers: what depends on the number or order of layers follows the chosen layers."""

import copy
import json
import re

import pytest
import transformers

from merganser.anatomy import infer_anatomy, slice_config
from merganser.anatomy.settings.by_layer import is_by_layer
from merganser.anatomy.settings.config import COUNT_KEYS, as_int, text_scopes
from merganser.anatomy.settings.kinds import _DERIVED_ELSEWHERE
from merganser.anatomy.settings.refit import RULE_KEYS
from merganser.errors import UnsupportedError
from tests.anatomy.settings.depth_keys import OTHER_KEYS, REFUSED

SUSPECT = re.compile(
    r"layer|block|stage|depth|period|interval|every|freq|step|(^|_)(idxs?|indices|indexes)$|_ids$|first_|last_|source"
    r"|(start|end)_index|sparse|dense|pattern|shared|sharing|types$|hybrid|loop|recur|mtp|nextn|accept|hook"
)
BESIDE = re.compile(
    r"norm|drop|token_ids$|attention_(in|out|dropout)|_init|dense_act|intermediate_size$|experts$|layerscale"
)


def as_written(config):
    """Return a config as its file holds it, without the time that sorting takes."""
    return json.loads(json.dumps(config.to_dict(), default=str))


@pytest.fixture(scope="module")
def configs():
    """Return the default config of every class, as config.json holds it."""
    found = {}
    for name, kind in transformers.CONFIG_MAPPING.items():
        try:
            found[name] = as_written(kind())
        except Exception:  # a few need other configs, and each says so in its own way
            continue
    assert len(found) > 300
    return found


def counted_scopes(config):
    for scope in text_scopes(config):
        for key in COUNT_KEYS:
            if as_int(scope.get(key)):
                yield scope, scope[key]
                break


def test_every_key_that_may_depend_on_depth_is_known(configs):
    unknown = {}
    for name, config in configs.items():
        for scope, count in counted_scopes(config):
            for key, value in scope.items():
                nested = isinstance(value, dict) and key != "per_layer_config"
                flat = isinstance(value, (bool, float, str)) or nested
                by_length = isinstance(value, list) and len(value) == count
                if by_length or (SUSPECT.search(key) and not BESIDE.search(key) and not flat):
                    unknown.setdefault(key, f"{name}: {str(value)[:60]}")
    known = {*COUNT_KEYS, *RULE_KEYS, *OTHER_KEYS}
    left = {key: where for key, where in unknown.items() if key not in known and not is_by_layer(key)}
    assert sorted(f"{key}: {where}" for key, where in left.items()) == []


def lists_by_layer(scope, count):
    return {
        key: value
        for key, value in scope.items()
        if isinstance(value, list) and len(value) == count and key not in OTHER_KEYS and key != "architectures"
    }


def loaded_scope(name, config, path):
    """Return the part of the config that describes the layers, as the class reads it."""
    # classes change what they are given
    read = transformers.CONFIG_MAPPING[name].from_dict(copy.deepcopy(config))
    return inside(as_written(read), path)


def inside(config, path):
    for key in path:
        config = config[key]
    return config


def path_to(config, scope):
    if config is scope:
        return []
    for key, value in config.items():
        if isinstance(value, dict) and (path := path_to(value, scope)) is not None:
            return [key, *path]
    return None


def without(config, path, keys):
    result = copy.deepcopy(config)
    for key in keys:
        inside(result, path).pop(key)
    return result


def carried_over(key, value, layers):
    """Return what the list must be for these layers, from what the documentation of transformers says it means."""
    if key in ("full_attn_idxs", "moe_layers", "rope_scaling_layers", "window_block_indexes"):
        return [position for position, index in enumerate(layers) if index in value]
    if key == "kv_source_layers":
        return list(range(len(layers)))
    if key == "target_layer_ids":
        return value
    return [value[index] for index in layers]


def test_lists_follow_their_layers_or_are_refused_by_name(configs):
    wrong, right, refused = [], 0, {}
    seen = set()
    for name, config in configs.items():
        for scope, count in counted_scopes(config):
            path = path_to(config, scope)
            lists = lists_by_layer(scope, count)
            kind = scope.get("model_type")
            if not lists or count < 3 or kind in seen:
                continue
            seen.add(kind)
            shapes = {f"layers.{index}.mlp.up_proj.weight": (2, 2) for index in range(count)}
            for form in ("written out", "left to the class"):
                given = config
                if form == "left to the class":
                    if "depths" in lists:
                        # stages, which are refused where they are written out
                        continue
                    given = without(config, path, lists)
                    read = loaded_scope(name, given, path)
                    if any(read.get(key) != value for key, value in lists.items()):
                        continue
                anatomy = infer_anatomy(shapes, given)
                for layers in ([*range(1, count)], [*range(count - 1)], [*range(count - 1), *range(1, count)]):
                    try:
                        sliced = slice_config(given, layers, anatomy=anatomy).config
                    except UnsupportedError as error:
                        refused.setdefault(kind, str(error))
                        continue
                    read = loaded_scope(name, sliced, path)
                    off = [key for key in lists if read.get(key) != carried_over(key, lists[key], layers)]
                    right += not off
                    wrong += [f"{kind} {form} {layers[:2]}...: {key}" for key in off]
    assert wrong == []
    assert right > 300
    assert refused.keys() <= {*_DERIVED_ELSEWHERE, *REFUSED}
    assert all(re.search(r"config\.json: \w+", message) for message in refused.values())
