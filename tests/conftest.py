"""What a machine does not have is skipped, with the reason; and what is shared by the tests of a process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from opsd_kernels import rows_native
from tests.ready_python import ready_python


@pytest.fixture(scope="session")
def python() -> Iterator[Path]:
    """For tests that start many commands: an interpreter that has imported what takes long."""
    with ready_python() as path:
        yield path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A case whose parameters ask for the C++ rows needs the library, which an install without a compiler has not."""
    case = getattr(item, "callspec", None)
    if case is not None and "native" in [value for value in case.params.values() if isinstance(value, str)]:
        why = rows_native.obstacle()
        if why:
            pytest.skip(why)
