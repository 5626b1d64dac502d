"""One deployment of real processes for the tests of this folder: own port, own HOME, own states, stopped in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import Federation, running

from pfedsam.data.phantom import write_phantom


@pytest.fixture(scope="package")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_phantom(tmp_path_factory.mktemp("phantom"), sites=2, cases=4, shape=(48, 48, 6))


@pytest.fixture(scope="package")
def federation(tmp_path_factory: pytest.TempPathFactory, phantom: list[Path]) -> Iterator[Federation]:
    with running(tmp_path_factory.mktemp("poc"), phantom) as federation:
        yield federation
