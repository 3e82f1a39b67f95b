"""Eight fake CPU devices for the whole suite, set before anything imports jax; float64 on request."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# The same examples in every run: a red suite must stay red until something is changed.
hypothesis.settings.register_profile("seqmix", deadline=None, derandomize=True)
hypothesis.settings.load_profile("seqmix")


MAPS = 20_000  # of the 65,530 that Linux gives a process; each compiled program takes some, and XLA dies without


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """After a module, what jax has compiled is let go before the process runs out of memory maps."""
    yield
    try:
        with open("/proc/self/maps") as maps:
            many = sum(1 for _ in maps) > MAPS
    except OSError:  # no Linux
        many = False
    if many:
        jax.clear_caches()


@pytest.fixture
def x64():
    """float64 arrays within the test."""
    with jax.enable_x64(True):
        yield
