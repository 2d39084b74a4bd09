"""Published methods that no recipe can name as its `merge_method`: where they are in another form, or why they are not here.

The message for such a name, and the last two tables of docs/methods/README.md, are made from this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["ELSEWHERE", "Elsewhere", "elsewhere"]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A published method, or a group of them.

    Args:
        names: Their names; case, hyphens, underscores and spaces make no difference, and `+` is `p`.
        says: A sentence that names the form that is here, or the reason why there is none.
        page: The page of docs/ that has more; empty for methods that are not here at all.
    """

    names: tuple[str, ...]
    says: str
    page: str = ""


def elsewhere(name: str) -> str | None:
    """Return what the list says about a name that no method has; None if it is not in the list."""
    found = _by_name().get(_plain(name))
    if found is None:
        return None
    more = f" See docs/{found.page}" if found.page else ""
    return f"{name!r} is not a merge method of recipes: {found.says}.{more}"


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Elsewhere]:
    return {_plain(name): each for each in ELSEWHERE for name in each.names}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold().replace("+", "p") if letter.isalnum())


_SUMMARY = "we found only a summary of it, without formulas to check against"

_IN_ANOTHER_FORM = (
    # under another name, or as parameters of a method
    Elsewhere(("RegMean++", "regmean_plusplus"), "it is `regmean_plus`", "methods/regmean_plus.md"),
    Elsewhere(
        ("LOT", "lot_merging"),
        "it is `regmean` with `alpha: 1` and `reference: base`, but for the norms",
        "methods/regmean.md",
    ),
    Elsewhere(
        ("Expert Merging++",),
        "it is `expert_merging_whole` (or `expert_merging`) with `chunks` above 1; choosing their number by importance is not available",
        "methods/expert_merging_whole.md",
    ),
    Elsewhere(("NAN",), "it is `nan_merging`", "methods/nan_merging.md"),
    Elsewhere(("CoPA", "copa_merging"), "it is `robust_merge`", "methods/robust_merge.md"),
    Elsewhere(("RESM",), "it is `r_tsvm`", "methods/r_tsvm.md"),
    Elsewhere(("BitDelta",), "its signs and scales are what `one_bit` stores", "methods/one_bit.md"),
    Elsewhere(("GraftLLM",), "it is `skillpack`", "methods/skillpack.md"),
    Elsewhere(("MWA", "metrics_weighted_averaging"), "it is `metrics_weighted`", "methods/metrics_weighted.md"),
    Elsewhere(("Branch-Train-Merge",), "its average is `btm`", "methods/btm.md"),
    Elsewhere(
        ("model soup", "soup", "uniform_soup"), "it is `linear`, or `greedy_soup` with scores", "methods/greedy_soup.md"
    ),
    Elsewhere(("frankenmerge", "stack"), "it is `passthrough` with `slices`", "recipes.md"),
    Elsewhere(
        ("Param-Delta",),
        "it is `task_arithmetic` with the old base as `base_model`, and the new base and the tuned model as models",
        "methods/task_arithmetic.md",
    ),
    Elsewhere(
        ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
        "it is `add_weighted_adapter` with that `combination_type`, which merges adapters",
        "methods/add_weighted_adapter.md",
    ),
    Elsewhere(("Core Space",), "merges of adapters go through it unless the recipe says `space: full`", "adapters.md"),
    # before the merge
    Elsewhere(
        ("Git Re-Basin", "weight_matching", "activation_matching"),
        "`align` in a recipe of any method permutes units into the order of a reference",
        "alignment.md",
    ),
    Elsewhere(("DIMAT",), "one round is a recipe of `linear` with `align`", "alignment.md"),
    Elsewhere(("Model Kinship",), "`merganser inspect MODEL MODEL --base BASE` measures it", "report.md"),
    # searches
    Elsewhere(
        ("evolutionary", "evolve", "cma_es", "dfs", "Mergenetic", "MERGE3"),
        "`merganser search` finds open values of any recipe, paths through layers too",
        "search.md",
    ),
    Elsewhere(("MAP",), "`merganser search` with the sampler `quadratic`, `bayesian` or `nested`", "search.md"),
    Elsewhere(("M2N2", "natural_niches"), "`merganser search --sampler m2n2`", "search.md"),
    Elsewhere(("GENOME", "GENOME+"), "`merganser search --sampler genome`, or `particles` for GENOME+", "search.md"),
    Elsewhere(
        ("Model-GLUE",), "`merganser search --sampler greedy`; its clusters of models are not available", "search.md"
    ),
    Elsewhere(
        ("recycling", "recycled_checkpoints"),
        "`merganser search` of `linear` with a weight per model, and `--sampler cma`",
        "search.md",
    ),
    Elsewhere(
        ("Unconstrained Model Merging", "unconstrained_merging"),
        "`merganser search` for models of one shape, `merganser fuse train` for others",
        "fusion-recipes.md",
    ),
    Elsewhere(
        ("Self Positioning",),
        "no source that we read has its formula; `merganser search` finds such weights with your own score",
        "search.md#embedding-models",
    ),
    # mixtures of experts, and tasks that are chosen while a model runs
    Elsewhere(("mergekit-moe", "moe"), "`merganser mix` builds mixtures of experts", "mixtures.md"),
    Elsewhere(
        ("BTX", "branch_train_mix"),
        "`merganser mix` with `shared: {merge_method: linear}`; train the result with your own trainer",
        "mixtures.md",
    ),
    Elsewhere(("FlexOlmo",), "`merganser mix` with `join`", "mixtures.md"),
    Elsewhere(("DUME",), "`merganser mix` with `gate_mode: ridge`", "mixtures.md"),
    Elsewhere(("REAP",), "`merganser shrink --method reap` makes mixtures smaller", "shrinking.md"),
    Elsewhere(("REAM",), "`merganser shrink --method ream` makes mixtures smaller", "shrinking.md"),
    Elsewhere(("M-SMoE",), "`merganser shrink --method msmoe` makes mixtures smaller", "shrinking.md"),
    Elsewhere(("HC-SMoE",), "`merganser shrink --method hc_smoe` makes mixtures smaller", "shrinking.md"),
    Elsewhere(("Sub-MoE",), "`merganser shrink --method sub_moe` makes mixtures smaller", "shrinking.md"),
    Elsewhere(("MergeMoE",), "`merganser shrink --method merge_moe` makes mixtures smaller", "shrinking.md"),
    Elsewhere(
        ("WEMoE", "E-WEMoE", "weight_ensembling_moe", "MoLE", "Self-MoE", "MiXSE", "SMILE"),
        "`merganser route --gates` adds weighted parts of all tasks within one model",
        "gates.md",
    ),
    Elsewhere(
        ("BAM", "branch_attend_mix"),
        "`merganser route --gates bam` mixes the outputs of attention and MLPs within one model, without training them further",
        "gates.md",
    ),
    Elsewhere(("MEO",), "`RoutedModel` with `blend` makes one model of several tasks for each text", "sidecars.md"),
    Elsewhere(
        ("MergeME",),
        "`merganser route --gates mergeme` mixes models of unequal sizes; `merganser mix` those of one shape",
        "gates.md",
    ),
    # training
    Elsewhere(
        ("FuseLLM", "FuseChat", "Fusion-X"), "`merganser fuse train` trains a model on predictions of others", "fuse.md"
    ),
    Elsewhere(("ALM",), "`merganser fuse train` with `loss: alm`", "fuse.md"),
    Elsewhere(
        ("Disperse-then-Merge", "Mistral-C2F"),
        "train with `merganser fuse train` or your own trainer, merge with `linear` or `task_arithmetic`",
        "fusion-recipes.md",
    ),
    Elsewhere(("LLM-Blender", "best_of_n"), "`merganser fuse answer` blends answers of several models", "answers.md"),
    # vocabularies
    Elsewhere(
        ("OMP", "WECHSEL", "FOCUS", "TransMI", "tokensurgeon"),
        "`merganser transplant` gives a model other tokens",
        "vocabularies.md",
    ),
    # while a model runs
    Elsewhere(
        ("ToMe", "PiToMe", "TempMe", "HoliTom", "token_merging"),
        "`merganser.runtime` merges tokens of vision encoders",
        "runtime.md",
    ),
    Elsewhere(
        ("KVMerger", "EMS", "D2O", "MiniCache", "RazorAttention", "TaskKV", "SnapKV"),
        "`merganser.runtime.MergedCache` merges entries of key-value caches",
        "runtime.md",
    ),
    Elsewhere(("MrT5", "GMSA"), "`merganser.runtime.trained` has its layer, for a model that you train", "runtime.md"),
)

_NOT_HERE = (
    Elsewhere(
        ("Defense-Aware Merging", "defense_aware"),
        "it finds backdoors by perturbing images; no form for text was found",
    ),
    Elsewhere(
        ("AdaMerging++",),
        "its first step, TIES on the task vectors, is not available; `adamerging` is the rest",
    ),
    Elsewhere(("AdaRank",), "it adapts to test images by their entropy, which is a poor guide for language models"),
    Elsewhere(("HARC",), "no source that we read has its formula; `regmean` fits routers of mixtures that are merged"),
    Elsewhere(
        ("MC-SMoE",), "its low-rank step needs training and an architecture of its own; M-SMoE is in `merganser shrink`"
    ),
    Elsewhere(
        ("Reinforced Model Merging",),
        "it chooses layers by reinforcement learning; `merganser search` chooses paths through layers by trials",
    ),
    Elsewhere(
        ("Evo-Merging",),
        "its pruning of one factor of each adapter could not be checked; `merganser search` finds scales of adapters",
    ),
    Elsewhere(
        ("DuoAttention",),
        "it trains a gate for every head; `razor_attention` in `merganser.runtime` chooses heads without training",
    ),
    Elsewhere(("SuperBPE", "BLT"), "new tokenizers must be trained, and models with them"),
    Elsewhere(
        ("WRPO", "FuseChat-3.0"),
        "it trains on answers of several models that a reward model ranks; trainers such as TRL do that",
    ),
    Elsewhere(
        ("InfiFusion", "InfiGFusion", "PTA-LLM"),
        "alignment of logits by optimal transport is not available; `merganser fuse` aligns by bytes",
    ),
    Elsewhere(("ProDistill",), f"{_SUMMARY}; `expert_merging` also learns coefficients layer by layer"),
    Elsewhere(("Chain of Merges",), f"{_SUMMARY}; `regmean_plus` also measures what the merged layers before compute"),
    Elsewhere(("Functional Dual Anchors",), f"{_SUMMARY}, and it trains on inputs that it makes"),
    Elsewhere(("LEWIS",), f"{_SUMMARY}; densities can be given by layer"),
    Elsewhere(("TADrop", "LARV"), f"{_SUMMARY}; densities and factors can be given by filter and layer"),
    Elsewhere(("ReasonAny",), f"{_SUMMARY}; `rcp` and `rain` join reasoning with other skills"),
    Elsewhere(("CABS+",), f"{_SUMMARY}; `cabs` is available"),
    Elsewhere(
        ("TVQ", "task_vector_quantization"), f"{_SUMMARY}; `skillpack` and `one_bit` store task vectors in few bits"
    ),
    Elsewhere(
        ("SimMerge",), f"{_SUMMARY}, and it learns from many past merges; `merganser auto` tries methods on your models"
    ),
    Elsewhere(
        ("LoRE",),
        "its base and task vectors are estimated so that their average is that of the models; the factor it adds them with was not found",
    ),
    Elsewhere(
        (
            "DC-Merge",
            "Essential Subspace Merging",
            "CORAM",
            "ResMerge",
            "SCF-RKL",
            "FREE-Merging",
        ),
        _SUMMARY,
    ),
)

ELSEWHERE = (*_IN_ANOTHER_FORM, *_NOT_HERE)
"""In another form first, those with a page; then those that are not here."""
