"""Settings of all tests."""

from hypothesis import settings

# What CI says must not depend on chance; who works on the code tries other examples every time.
settings.register_profile("fixed", derandomize=True)
