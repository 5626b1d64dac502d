"""Makes `tests/image_files.py` importable from every folder of tests, and says which tests go together, and when."""

import pytest

#: Folders whose tests start servers and sites.
WITH_PROCESSES = ("jobs", "poc")
#: Files that read the same runs of the simulator: one worker makes them once.
SAME_RUNS = ("test_simulated_jobs.py", "test_nothing_personal_leaves.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: at the end, all but one worker would wait for them.

    The tests of a file go to one worker, as with `--dist loadfile`.
    """
    items.sort(key=lambda item: item.path.parent.name not in WITH_PROCESSES)
    for item in items:
        group = "same runs" if item.path.name in SAME_RUNS else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
