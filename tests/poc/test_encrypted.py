"""Encryption from the project file to the sites' personal models: real processes, real keys, locked job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from deployed import PROJECT, Federation, running

from pfedsam.deployment.audit import audit
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.federated.records import CHECKED, LEFT
from pfedsam.files import read_safetensors
from pfedsam.storage.global_model import SCHEMA
from pfedsam.storage.site_model import read

pytest.importorskip("tenseal")
pytestmark = pytest.mark.slow

BUILDER = {"path": "nvflare.lighter.impl.he.HEBuilder", "args": {"poly_modulus_degree": 8192, "scale_bits": 40}}


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, phantom: list[Path]) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("encrypted")
    content = yaml.safe_load(PROJECT.read_text())
    # before the signatures: the context is signed, too
    content["builders"].insert(-1, BUILDER)
    (folder / "project.yml").write_text(yaml.safe_dump(content))
    with running(folder, phantom, project=folder / "project.yml") as federation:
        yield federation


def test_two_encrypted_rounds_through_real_processes(encrypted: Federation) -> None:
    result = encrypted.run(encrypted.job("encrypted", rounds=2, privacy=Privacy(encrypt=True)), timeout=400)
    assert result.completed, result.problem()
    states = encrypted.states()
    assert set(states) == {"hospital-a", "hospital-b"}
    assert all(entry.info["final"] and entry.info["round"] == 2 for entry in states.values())
    last = result.file("global_model.safetensors")
    assert last is not None and result.file("best_global_model.safetensors") is not None
    tensors, metadata = read_safetensors(last)
    assert metadata[SCHEMA] == "ckks-1" and {str(tensor.dtype) for tensor in tensors.values()} == {"torch.uint8"}
    found = audit(encrypted.deployment.kit("hospital-a"), result.job_id)
    assert found.problems == []
    checked, left = ([one for one in found.stage(name) if one["task"] == "train"] for name in (CHECKED, LEFT))
    assert len(checked) == len(left) == 2
    assert all(after["bytes"] > 2 * before["bytes"] for before, after in zip(checked, left, strict=True))
    # the evaluation at the end sends the ciphertexts of the last model to the sites
    validated = [one for one in found.stage(LEFT) if one["task"] == "validate"]
    assert validated and all(one["reply"] == "OK" for one in validated)
    # the final personal phase starts at both sites from the same decrypted model
    first, second = (read(entry.file).shared for entry in states.values())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
