"""What a machine does not have is skipped, with the reason."""

import pytest

from opsd_kernels import rows_native


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A case whose parameters ask for the C++ rows needs the library, which an install without a compiler has not."""
    case = getattr(item, "callspec", None)
    if case is not None and "native" in [value for value in case.params.values() if isinstance(value, str)]:
        why = rows_native.obstacle()
        if why:
            pytest.skip(why)
