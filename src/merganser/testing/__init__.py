"""The contract suite: laws that every merge method must satisfy, whether ours or third-party.

A package that registers methods runs it in its own tests:

    import pytest
    from merganser.testing import contract
    from my_package import my_method

    @pytest.mark.parametrize("law", contract(my_method), ids=lambda law: law.__name__)
    def test_contract(law):
        law(my_method)
"""

from ..engine.kernels.merge_tensor import merge_tensor
from .laws import Law, check_citation, contract, probe
from .processes import check_reproducible

__all__ = ["Law", "check_citation", "check_reproducible", "contract", "merge_tensor", "probe"]
