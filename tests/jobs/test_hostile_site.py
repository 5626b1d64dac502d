"""One hostile site of four in NVFlare's simulator, with the default rule: the global model is as without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simulated import HERE, Job, Run, simulate

from pfedsam.bundles import folder, network_of
from pfedsam.data.phantom import write_phantom
from pfedsam.evaluation.site import evaluate_site
from pfedsam.federated.rounds import remarks
from pfedsam.parameters import manifest
from pfedsam.storage.global_model import read_global_model
from pfedsam.storage.site_model import SiteModel, write
from pfedsam.training.catalogue import find_strategy

BUNDLE, HOSTILE, ROUNDS = "brain_lesion_mri", "site-2", 4
STRATEGY = find_strategy("fedavg_lora")
#: The real backbone, as small as it learns something in minutes.
SETTINGS = {
    "image_size": 64,
    "batch_size": 2,
    "augmentations": 1,
    "adapted_blocks": 1,
    "positives_per_case": 4,
    "negatives_per_case": 2,
    **STRATEGY.overrides,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("four") / "data"
    write_phantom(data, 4, 9, (96, 96, 12), 0)
    return data


def run(out: Path, data: Path, attacks: list[str], sites: int = 4) -> Run:
    """A run in which `HOSTILE` attacks; without attacks and with three sites it takes no part."""
    job = Job(sites=sites, recorded=False, source=folder("jobs") / "fedavg_lora")
    job.server |= {"num_rounds": ROUNDS, "min_clients": 3}
    job.server["workflows"] = job.server["workflows"][:1]
    job.server["workflows"][0]["args"]["wait_time_after_min_received"] = 600
    job.plan["overrides"], job.plan["strategy"] = SETTINGS, STRATEGY.strategy
    job.custom["hostile.py"] = (HERE / "hostile.py").read_bytes()
    for number in range(sites):
        job.site(f"site-{number + 1}")
    if attacks:
        chain = job.site(HOSTILE)["task_result_filters"][0]["filters"]
        chain.append({"path": "hostile.Attack", "args": {"attacks": attacks}})
    found = simulate(out, job, data)
    assert found.exit_code == 0 and found.global_model.is_file(), found.output[-3000:]
    return found


def dice(found: Run, data: Path, names: dict[str, str]) -> dict[str, float]:
    """Dice of the last global model on the cases outside training of the honest sites, by their names in `data`."""
    roles = STRATEGY.checked().roles
    theta, fingerprint = read_global_model(
        found.global_model, manifest(network_of(BUNDLE, SETTINGS, weights=False), roles, "shared")
    )
    told = {"fingerprint": fingerprint, "roles": {"shared": list(roles.shared), "personal": list(roles.personal)}}
    file = found.folder / "global.safetensors"
    write(file, SiteModel(theta, {}, {}, told))
    scores = {}
    for name in names:
        parts = [
            evaluate_site(
                BUNDLE,
                data / name,
                file,
                overrides=SETTINGS,
                models=("global",),
                section=section,
                output_dir=found.folder,
            )
            for section in ("validation", "test")
        ]
        scores[name] = float(np.mean([score.mean_dice for part in parts for score in part.scores]))
    return scores


@pytest.mark.slow
def test_one_of_four_changes_nothing_that_counts_and_the_log_names_it(data: Path, tmp_path: Path) -> None:
    honest = {name: name for name in ("site-1", "site-3", "site-4")}
    three = tmp_path / "three"
    for number, name in enumerate(honest):
        three.mkdir(exist_ok=True)
        (three / f"site-{number + 1}").symlink_to(data / name)
    without = dice(run(tmp_path / "without", three, [], sites=3), data, honest)
    assert np.mean(list(without.values())) > 0.1, "it learns something, or nothing could be spoilt"
    for attack, words in (("all", "its update was left out"), ("old round", "the guard refused a result (E20")):
        found = run(tmp_path / attack.replace(" ", "_"), data, [attack])
        scores = dice(found, data, honest)
        print(attack, scores, "without it", without)
        assert np.mean(list(scores.values())) == pytest.approx(np.mean(list(without.values())), abs=0.02)
        told = remarks([found.workspace / "server" / "simulate_job"])
        assert told and all(line.startswith(f"{HOSTILE}: ") for line in told if "left out" in line or "refused" in line)
        assert any(line.startswith(HOSTILE) and words in line for line in told), told
        assert HOSTILE in found.server_log()
