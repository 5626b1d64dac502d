"""A federation in one process: the same local training, the reference aggregation, no NVFlare.

For comparing methods on one machine. With one torch thread it gives the tensors that the simulator gives; nothing is
sent anywhere, so there is no filter either. After every round the global model and each site's state are on disk, and a
run that was stopped goes on after the last round that all sites have done.

In the run folder, `models/<n>/<site>.safetensors` is what a site has after round n (counted from 0); the last n is that
of the final phases. The global model is written after the models of its round, in one step, and names the round: the
models of a later round beside it are those of a round that was not done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from pfedsam.bundles import network_of
from pfedsam.data.seen import POOL
from pfedsam.errors import PFedSAMError
from pfedsam.files import append_line, read_lines, read_safetensors, write_atomically
from pfedsam.networks.adaptation import EXPERT_SETTINGS
from pfedsam.parameters import shared_state
from pfedsam.storage.site_model import SiteModel, read, write
from pfedsam.training.aggregation import combine
from pfedsam.training.beside_rounds import beside_round, forget_before
from pfedsam.training.federation_downloads import DOWNLOADS, begun_downloads
from pfedsam.training.reported_weights import REPORTED, WeightsByReport
from pfedsam.training.round_result import RoundResult
from pfedsam.training.server_step import STEPS, ServerSteps, begun_steps
from pfedsam.training.site import SiteTrainer
from pfedsam.training.site_downloads import SiteDownloads
from pfedsam.training.strategy import Strategy

ROUND_FILE, HISTORY_FILE, MODELS = "global.safetensors", "history.jsonl", "models"
#: Which sites were alike, and what each downloaded: one line a round, of strategies with `downloads`.
DOWNLOADS_FILE = "downloads.jsonl"


@dataclass
class Federation:
    """What to run.

    Args:
        bundle: name of an installed bundle.
        sites: site folders by name.
        strategy: roles and phases.
        out: run folder; models and history are written here.
        rounds: number of rounds.
        overrides: listed ids of the bundle's configuration.
        settings: of `SiteTrainer`, for example `checkpoint`, `device`, `feature_store`.
        shared_rounds: a federation of the rounds alone, in which nothing personal takes part; it is run first, or what
            is left of it, and this one adds its final phases only.
    """

    bundle: str
    sites: Mapping[str, Path]
    strategy: Strategy
    out: Path
    rounds: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared_rounds: Federation | None = None

    def rounds_alone(self, root: Path, apart: str = "") -> Federation | None:
        """The rounds as a federation of their own, which all share that differ in what is personal; None if none can.

        Args:
            root: its folder is in there, named by a hash of all that the rounds depend on.
            apart: what else the rounds depend on: the split of the cases, the bundle's defaults.
        """
        strategy = self.strategy.rounds_alone()
        if strategy is None:
            return None
        overrides = {key: value for key, value in self.overrides.items() if key not in EXPERT_SETTINGS} | {"experts": 0}
        sites = {name: str(path) for name, path in self.sites.items()}
        settings = strategy.model_dump(mode="json", exclude={"interpolation", "serving"})  # of the final phases
        told = [self.bundle, sites, settings, overrides, self.rounds, apart]
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return Federation(self.bundle, self.sites, strategy, root / name, self.rounds, overrides, self.settings)

    def model_of(self, site: str) -> Path:
        """A site's newest complete model file: of its final phases, else of the last round that all sites have done."""
        number = self.rounds if _is_final(self, site) else self.global_model()[1] - 1
        return _model(self, site, number)

    def global_model(self) -> tuple[dict[str, Tensor], int]:
        """The last global model and the number of rounds behind it ({} and 0 before the first)."""
        if self.shared_rounds:
            return self.shared_rounds.global_model()
        path = self.out / ROUND_FILE
        if not path.exists():
            return {}, 0
        theta, metadata = read_safetensors(path)
        return theta, int(metadata["round"]) + 1

    def finished(self) -> bool:
        """Whether every site has its final model."""
        return all(_is_final(self, site) for site in self.sites)

    def history(self) -> list[dict[str, Any]]:
        """What was noted in each round and site, in order; the last note of a round and site counts."""
        path = self.out / HISTORY_FILE
        notes = self.shared_rounds.history() if self.shared_rounds else []
        notes += read_lines(path)
        return list({(note["round"], note["site"]): note for note in notes}.values())


def run_federation(federation: Federation, event: Callable[[str], None] | None = None, aggregated: bool = True) -> None:
    """Run a federation, or what is left of it.

    Args:
        federation: what to run.
        event: called with a line after each round of each site.
        aggregated: False for sites that train alone beside each other.

    Raises:
        PFedSAMError: of the first site that fails, with its name.
    """
    federation.out.mkdir(parents=True, exist_ok=True)
    if federation.finished():
        return
    if federation.shared_rounds:
        federation.shared_rounds.out.mkdir(parents=True, exist_ok=True)
        with FileLock(federation.shared_rounds.out / "lock"):  # others share it
            run_federation(federation.shared_rounds, event, aggregated)
    strategy, tell = federation.strategy, event or (lambda line: None)
    sites = {name: _open(federation, name) for name in federation.sites}
    theta, done = _start(federation, sites)
    start = _theta_0(federation) if 0 < done < federation.rounds else theta
    site_weights = WeightsByReport()
    for number in range(done):  # as they were when the run was stopped
        _weights(federation, sites, site_weights, number)
    folder = (federation.shared_rounds or federation).out
    downloads = begun_downloads(strategy, folder, done) if aggregated else None
    steps = begun_steps(strategy.server, folder, done) if aggregated and not federation.shared_rounds else None
    for number in range(done, federation.rounds):
        results, models = {}, {}
        for name, local in sites.items():
            results[name], models[name] = _round(federation, name, local, _received(downloads, name, theta), number)
            tell(f"{strategy.name}: round {number + 1} of {federation.rounds}, {name}")
        if aggregated and theta:
            deltas = {name: one.delta for name, one in results.items()}
            weights = _weights(federation, sites, site_weights, number)
            way = start if number else None
            theta = _aggregated(federation, theta, deltas, weights, way, downloads or steps, number)
        _save_round(federation, theta, models, number, next(iter(sites.values())).fingerprint)
    for name, local in sites.items():
        if _is_final(federation, name):
            continue  # this site's final phase was done before
        local.receive(_received(downloads, name, theta), local.fingerprint)
        started = time.monotonic()
        before = local.validate(experts=False)["val_dice"]
        result = local.finish(federation.rounds)
        after = local.validate(experts=True)["val_dice"] if strategy.keeps else before
        metrics = {"val_dice_global": before, "val_dice_personal": after}
        # the note first: a site with its final model is not asked again, and a second note of one phase does no harm
        _note(federation, name, federation.rounds, result, started, **metrics)
        write(_model(federation, name, federation.rounds), local.model(round=federation.rounds, final=True, **metrics))
        tell(f"{strategy.name}: final phase, {name}: global {before:.3f}, personal {after:.3f}")


def _received(downloads: SiteDownloads | None, site: str, theta: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a site begins with: the global model, or what it downloads in its place."""
    own = downloads.of(site) if downloads else None
    return theta if own is None else own


def _aggregated(
    federation: Federation,
    theta: dict[str, Tensor],
    deltas: Mapping[str, Mapping[str, Tensor]],
    weights: Sequence[float],
    start: Mapping[str, Tensor] | None,
    then: SiteDownloads | ServerSteps | None,
    number: int,
) -> dict[str, Tensor]:
    """The global model after a round; what the next one depends on beside it is kept in `then`, and on the disk."""
    if isinstance(then, SiteDownloads):
        outcome = then.next(number, theta, deltas, weights, start=start)
        append_line(federation.out / DOWNLOADS_FILE, {"round": number, **outcome.told})
        then.save(beside_round(federation.out, DOWNLOADS, number + 1))
        change: Mapping[str, Tensor] = outcome.change
    else:
        change, _ = combine(theta, list(deltas.values()), weights, federation.strategy.aggregation, start=start)
        if then is not None:
            change = then.next(change)
            then.save(federation.out, number + 1)
    return {name: (tensor.double() + change[name]).to(tensor.dtype) for name, tensor in theta.items()}


def _weights(
    federation: Federation, sites: Mapping[str, SiteTrainer], kept: WeightsByReport, number: int
) -> list[float]:
    """What each site counts in a round."""
    kind = federation.strategy.weights
    if kind not in REPORTED:
        return [local.weight for local in sites.values()]
    notes = {note["site"]: note for note in federation.history() if note["round"] == number}
    told = {name: notes[name].get(REPORTED[kind].note) for name in sites}
    return kept.next(kind, told, number, federation.rounds)


def _open(federation: Federation, name: str) -> SiteTrainer:
    output = federation.out / "sites" / name
    local = SiteTrainer(
        federation.bundle,
        federation.sites[name],
        federation.strategy,
        federation.overrides,
        output,
        **federation.settings,
    )
    try:
        local.open()
    except PFedSAMError as error:
        raise PFedSAMError(error.code, f"site '{name}': {error.message}", error.remedy) from error
    return local


def _start(federation: Federation, sites: Mapping[str, SiteTrainer]) -> tuple[dict[str, Tensor], int]:
    """The global model to go on from and the number of rounds done (E11 if they are of other base weights)."""
    theta, done = federation.global_model()
    if done and not federation.shared_rounds:
        _, metadata = read_safetensors(federation.out / ROUND_FILE)
        for local in sites.values():
            local.receive(theta, metadata["fingerprint"])
    if done and federation.strategy.remembers and not federation.shared_rounds:
        for name, local in sites.items():
            local.restore(read(_model(federation, name, done - 1)))
    if done:
        return theta, done
    return _theta_0(federation), 0


def _theta_0(federation: Federation) -> dict[str, Tensor]:
    """The shared tensors that the first round begins with."""
    network = network_of(federation.bundle, federation.overrides, checkpoint=federation.settings.get("checkpoint"))
    return shared_state(network, federation.strategy.roles)


def _round(
    federation: Federation, name: str, local: SiteTrainer, theta: Mapping[str, Tensor], number: int
) -> tuple[RoundResult, SiteModel]:
    started = time.monotonic()
    local.receive(theta, local.fingerprint)
    metrics = {}
    if local.validates(number):
        metrics["val_dice_global"] = local.validate(experts=False, in_round=True)["val_dice"]
    result = local.train(number)
    if (personal := local.personal_dice(number)) is not None:
        metrics["val_dice_personal"] = personal
    gap = {} if result.gap is None else {"gap": result.gap}
    _note(federation, name, number, result, started, **metrics, **gap)
    return result, local.model(round=number, final=False, **metrics)


def _note(
    federation: Federation, site: str, number: int, result: RoundResult, started: float, **metrics: float
) -> None:
    """One line of the history: what a curve needs."""
    phases = {
        name: {
            "loss": report.mean_loss if report.steps else None,
            "steps": report.steps,
            "teacher_passes": report.teacher_passes,
            "distilled_steps": report.distilled_steps,
        }
        for name, report in result.phases.items()
    }
    sent = sum(tensor.numel() * tensor.element_size() for tensor in result.delta.values())
    note = {"round": number, "site": site, **metrics, "bytes": sent, "phases": phases, "gates": result.gates}
    note["seconds"] = round(time.monotonic() - started, 2)
    append_line(federation.out / HISTORY_FILE, note)


def _save_round(
    federation: Federation, theta: Mapping[str, Tensor], models: Mapping[str, SiteModel], number: int, fingerprint: str
) -> None:
    """Write a round, which is done by all sites or by none: it counts from the moment the global model is there."""
    from safetensors.torch import save

    for name, model in models.items():
        write(_model(federation, name, number), model)
    write_atomically(
        federation.out / ROUND_FILE,
        save(dict(theta), metadata={"round": str(number), "fingerprint": fingerprint}),
    )
    for folder in (federation.out / MODELS).iterdir():
        if folder.name.isdigit() and int(folder.name) < number:
            shutil.rmtree(folder)
    for kind in (DOWNLOADS, STEPS):
        forget_before(federation.out, kind, number + 1)


def _model(federation: Federation, site: str, number: int) -> Path:
    """A site's model file of a round; that of the final phases has the number of rounds."""
    return federation.out / MODELS / str(number) / f"{site}.safetensors"


def _is_final(federation: Federation, site: str) -> bool:
    """Whether a site has done its final phases."""
    path = _model(federation, site, federation.rounds)
    return path.exists() and bool(read(path).info.get("final"))


def pooled_site(sites: Mapping[str, Path], out: Path, seed: int, folds: int) -> Path:
    """One site folder of links to the cases of all sites, each case in the section that it has at its own site.

    Args:
        sites: site folders by name.
        out: folder to make.
        seed: of the split.
        folds: of the split.

    Returns:
        `out`. Cases are named `<site>__<case>`, patients `<site>__<patient>`.
    """
    from pfedsam.data.sections import SECTIONS
    from pfedsam.data.sites import read_split

    listed: dict[str, Sequence[Any]] = {section: [] for section in SECTIONS}
    patients = {}
    for name, folder in sites.items():
        for section, cases in read_split(folder, seed, folds).items():
            for case in cases:
                new = f"{name}{POOL}{case.name}"
                patients[new] = f"{name}{POOL}{case.patient}"
                assert case.label is not None
                for kind, path in (("images", case.image), ("labels", case.label)):
                    link = out / kind / path.name.replace(case.name, new, 1)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.unlink(missing_ok=True)  # the data may lie elsewhere now
                    link.symlink_to(path.resolve())
                listed[section] = [*listed[section], new]
    (out / "datalist.json").write_text(json.dumps({**listed, "patients": patients}, indent=1) + "\n")
    return out
