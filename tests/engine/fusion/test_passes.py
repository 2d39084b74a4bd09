"""What is said about the passes of a method."""

import pytest
from torch import Tensor

from merganser.engine.fusion import machine
from merganser.method import merge_method
from merganser.method.registry import get_method
from merganser.testing import passes as passes_of  # the module
from merganser.testing.passes import Pass, passes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [Pass("merges", True)]),
        ("slerp", [Pass("measures factors", True), Pass("merges", True)]),
        (
            "ties",
            [
                Pass("measures cut, 1 of 2", True),
                Pass("measures cut, 2 of 2", True),
                Pass("measures gain", True),
                Pass("measures majority", True),
                Pass("merges", True),
            ],
        ),
        ("della_linear", [Pass("merges", True, ("merganser.order",))]),
        ("lines", [Pass("merges", True)]),
        ("cabs", [Pass("merges", True, ("cat", "merganser.order", "slice.Tensor"))]),
        ("iso_c", [Pass("merges", False, reason="a function over a whole matrix gains nothing from that")]),
    ],
)
def test_passes_of_methods(name: str, expected: list[Pass]) -> None:
    assert passes(get_method(name)) == expected


def test_a_method_that_looks_at_values() -> None:
    @merge_method(family="toys", cite="-")
    def curious(models: list[Tensor]) -> Tensor:
        """Take the first model, or the last.

        merged = something
        """
        return models[0] if float(models[0].sum()) > 0 else models[-1]

    (only,) = passes(curious)
    assert (only.what, only.fused) == ("merges", False)
    assert only.reason.endswith("looks at values")


def test_where_no_machine_code_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_of, "why_not", lambda: "this processor lacks AVX2")
    assert machine.why_not() is None
    assert passes(get_method("linear")) == [Pass("merges", False, reason="this processor lacks AVX2")]
