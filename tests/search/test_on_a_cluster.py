"""A search on a real Ray cluster of two nodes, one of which dies midway."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from merganser.search import search
from merganser.search.trials import Silent, Trial
from tests.search.conftest import RECIPE
from tests.search.test_many import figures, keys

pytestmark = pytest.mark.slow
cluster_utils = pytest.importorskip("ray.cluster_utils")


def test_same_trials_though_a_node_dies(tmp_path: Path) -> None:
    given = {"trials": 16, "sampler": "random", "dtype": "float32", "limit": 8}
    whole = search(RECIPE, tmp_path / "whole", ["one.jsonl"], **given)  # type: ignore[arg-type]
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = started.add_node(num_cpus=1)

        class Kill(Silent):
            def over(self, trial: Trial, best: Trial | None) -> None:
                if trial.number == 5:
                    threading.Thread(target=started.remove_node, args=(node, False)).start()

        found = search(
            RECIPE, tmp_path / "out", ["one.jsonl"], cluster=started.address, progress=Kill(), **given  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        started.shutdown()
    assert figures(found) == figures(whole)
    assert set(keys(tmp_path / "out").values()) == {1}
    # both nodes worked
    text = (tmp_path / "out" / "trials.log").read_text()
    assert len({line.partition('"process":"')[2][:60] for line in text.splitlines() if '"process":"' in line}) >= 2
