"""Makes `tests/image_files.py` importable from every folder of tests, and starts with the tests that take longest."""

import pytest

#: Folders whose tests start servers and sites.
WITH_PROCESSES = ("jobs", "poc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: at the end, all but one worker would wait for them."""
    items.sort(key=lambda item: item.path.parent.name not in WITH_PROCESSES)
