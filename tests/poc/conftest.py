"""One deployment of real processes for the tests of this folder: own port, own HOME, own states, stopped in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import FEDERATION, PROJECT, Federation, free_port

from pfedsam.data.phantom import write_phantom
from pfedsam.federated.admin import connect
from pfedsam.federated.processes import OUTCOME_VARIABLE, Deployment


@pytest.fixture(scope="package")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_phantom(tmp_path_factory.mktemp("phantom"), sites=2, cases=4, shape=(48, 48, 6))


@pytest.fixture(scope="package")
def federation(tmp_path_factory: pytest.TempPathFactory, phantom: list[Path]) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("poc")
    deployment = Deployment(folder / "runtime", PROJECT, free_port())
    data = dict(zip(deployment.sites, phantom, strict=True))
    deployment.provision()
    deployment.init(data, {"federations": [FEDERATION]})
    try:
        deployment.start(environment={OUTCOME_VARIABLE: "10"})
        with connect(deployment.admin()) as session:
            deployment.wait(session)
            yield Federation(deployment, data, session, folder)
    finally:
        assert deployment.stop() == []
        deployment.require_free_port()
