"""Settings of all tests."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import shared

# What CI says must not depend on chance; who works on the code tries other examples every time.
settings.register_profile("fixed", derandomize=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have the garbage collector skip what stays to the end: libraries, and the thousands of tests themselves."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders that tests share; what merganser keeps for its user, such as speeds of methods, stays the user's."""
    shared.FOLDER[:] = [tmp_path_factory.mktemp("shared")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
