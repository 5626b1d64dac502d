"""Makes `tests/image_files.py` importable from every folder of tests, and says which tests go together, and when."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import pytest

#: Folders whose tests start servers and sites.
WITH_PROCESSES = ("jobs", "poc")
#: Files that read the same runs of the simulator: one worker makes them once.
SAME_RUNS = ("test_simulated_jobs.py", "test_nothing_personal_leaves.py")


def pytest_configure() -> None:
    """Two files of tests of one name cannot be collected together: every run says so, also one of a single file."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise pytest.UsageError(f"two files of tests are called {', '.join(twice)}: rename one of them")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: at the end, all but one worker would wait for them."""
    items.sort(key=lambda item: item.path.parent.name not in WITH_PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` the tests of a file go to one worker, and those of `SAME_RUNS` all to one.

    Groups (`--dist loadgroup`) would say the same, but have no effect with pytest 9.2.0 and pytest-xdist 3.8.0.
    """
    from xdist.scheduler import LoadFileScheduling

    class BySameRuns(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "same runs" if PurePath(file).name in SAME_RUNS else file

    return BySameRuns(config, log) if config.getoption("dist") == "loadfile" else None
