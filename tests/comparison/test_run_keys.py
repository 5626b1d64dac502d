"""What a record belongs to: the rule of the server is a part of it, and those of the plain mean keep their keys."""

from __future__ import annotations

import pytest

from pfedsam.comparison.run import Run
from pfedsam.errors import PFedSAMError
from pfedsam.files import hash_of
from pfedsam.training.catalogue import find_strategy


def run(strategy: str, aggregation: str | None = None) -> Run:
    return Run("nowhere", ("a", "b"), "brain_lesion_mri", strategy, 0, 8, aggregation=aggregation)


@pytest.fixture(autouse=True)
def _split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "split_hash", lambda self: "split")


@pytest.mark.parametrize("strategy", ["fedavg_lora", "pfedsam", "ditto"])
def test_a_record_of_the_mean_is_none_of_the_default_rule(strategy: str) -> None:
    mean, default = run(strategy, "mean"), run(strategy)
    assert mean.training_key() != default.training_key() == run(strategy, "norm_clipped").training_key()
    assert mean.file.checked().aggregation == "mean" and default.file.checked().aggregation == "norm_clipped"
    # as it was before there was another rule
    file = find_strategy(strategy)
    told = {**file.strategy, "name": "", "validate_every": 3}
    settings = {**file.overrides, "seed": 0}
    wanted = [mean.bundle, mean.sites, told, "federated", settings, 8, None, False]
    assert mean.training_key() == hash_of([wanted, "split"])[:16]


@pytest.mark.parametrize("strategy", ["local_only", "centralised", "ensemble_local"])
def test_a_strategy_without_a_server_has_no_rule(strategy: str) -> None:
    assert run(strategy, "median").key() == run(strategy).key()


def test_a_rule_that_a_strategy_names_stays_and_an_unknown_one_is_refused() -> None:
    assert run("aggregation_svd", "mean").key() == run("aggregation_svd").key()
    with pytest.raises(PFedSAMError, match=r"E16.*aggregation"):
        run("fedavg_lora", "best").file.checked()
