"""One run of a comparison: a strategy on one split of the sites, and what tells it from every other run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedsam.comparison.provenance import (
    INDIFFERENT,
    bundle_hash,
    defaults,
    split_hash,
    weights_checksum,
)
from pfedsam.data.site_folder import Split
from pfedsam.data.sites import read_split
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import content_hash, hash_of
from pfedsam.training.catalogue import StrategyFile, find_strategy, strategy_name, strategy_names
from pfedsam.training.federation import Federation, pooled_site


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        data: folder that holds the site folders.
        sites: names of the sites.
        bundle: name of an installed bundle.
        strategy: name or path of a strategy, or name of an ablation.
        seed: fold and draws.
        rounds: of the federation.
        overrides: listed ids of the bundle's configuration; a strategy's own come on top.
        validate_every: validate the global model every so many rounds.
        held_out: a site that takes no part, see `pfedsam.comparison.unseen`.
        simulator: train with NVFlare's simulator, if the strategy needs a server, instead of in this process.
        aggregation: rule of the server for strategies that name none; None for the default.
    """

    data: str
    sites: tuple[str, ...]
    bundle: str
    strategy: str
    seed: int
    rounds: int
    overrides: dict[str, Any] = field(default_factory=dict)
    validate_every: int = 3
    held_out: str | None = None
    simulator: bool = False
    aggregation: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        unseen = f", without {self.held_out}" if self.held_out else ""
        return f"{self.label}, seed {self.seed}{unseen}{', simulator' if self.simulated else ''}"

    @property
    def label(self) -> str:
        """The strategy's name, also where it is a file: for records, tables and logs."""
        return strategy_name(self.strategy)

    @property
    def settings(self) -> dict[str, Any]:
        """All overrides of the bundle."""
        return {**self.overrides, **self.file.overrides, "seed": self.seed}

    @property
    def named(self) -> StrategyFile:
        """The strategy as its file has it (E28 if there is none)."""
        return find_strategy(self.strategy)

    @property
    def file(self) -> StrategyFile:
        """The strategy with the rule of the server (E28 if there is none)."""
        strategy_file = self.named
        if self.aggregation is None or strategy_file.kind != "federated" or "aggregation" in strategy_file.strategy:
            return strategy_file
        return strategy_file.model_copy(
            update={"strategy": {**strategy_file.strategy, "aggregation": self.aggregation}}
        )

    @property
    def simulated(self) -> bool:
        """Whether NVFlare's simulator trains it."""
        return self.simulator and self.file.kind == "federated"

    def check(self) -> None:
        """Raise PFedSAMError E32 if the strategy has nothing for an unseen site."""
        if self.held_out and self.file.kind == "ensemble":
            can = [name for name in strategy_names() if find_strategy(name).kind != "ensemble"]
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"'{self.label}' has no model for an unseen site: it is a vote of models.",
                f"Take any of {can}.",
            )
        if self.held_out and self.simulated:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"'{self.name}': NVFlare's simulator has no unseen site.",
                "Leave out --nvflare.",
            )

    def folders(self) -> dict[str, Path]:
        """Site folders by name."""
        return {site: Path(self.data) / site for site in self.sites}

    def training_key(self) -> str:
        """Hash of all that the training depends on: runs with the same key share it."""
        file = self.file
        strategy = {**file.strategy, "name": "", "validate_every": self.validate_every}
        strategy.pop("aggregation", None)
        rule = file.checked().aggregation
        if file.kind == "federated" and rule != "mean":  # which was the default when the first records were made
            strategy["aggregation"] = rule
        kind = "local" if file.kind == "ensemble" else file.kind
        settings = {key: value for key, value in self.settings.items() if key not in INDIFFERENT}
        if settings.get("experts") == 0 and settings.get("lora_rank") == 0:
            settings.pop("adapted_blocks", None)  # they get nothing
        terms = [self.bundle, self.sites, strategy, kind, settings, self.rounds, self.held_out, self.simulator]
        return hash_of([terms, self.split_hash()])[:16]

    def key(self) -> str:
        """Hash of all that the record depends on: a run with a record is not repeated."""
        return f"{self.training_key()}-{hash_of([self.label, self.file.kind])[:8]}"

    def splits(self) -> dict[str, Split]:
        """The cases of each section of each site."""
        folds = int(self.settings.get("folds", 3))
        return {site: read_split(path, self.seed, folds) for site, path in self.folders().items()}

    def split_hash(self) -> str:
        """Hash of which case is in which section at which site."""
        return split_hash(self.splits())

    def federation(self, out: Path) -> Federation:
        """What is trained, in the comparison's folder `out`; `shared_rounds` is set where others share them."""
        file, folder_ = self.file, self.training_folder(out)
        strategy = file.checked().model_copy(update={"validate_every": self.validate_every})
        sites = {name: path for name, path in self.folders().items() if name != self.held_out}
        if file.kind == "pooled":
            folds = int(self.settings.get("folds", 3))
            sites = {"pooled": pooled_site(sites, folder_ / "pooled", self.seed, folds)}
        settings = {"feature_store": out / "features"}
        federation = Federation(self.bundle, sites, strategy, folder_, self.rounds, self.settings, settings)
        if file.kind == "federated" and not self.simulator:
            federation.shared_rounds = federation.rounds_alone(
                out / "rounds", f"{self.split_hash()} {self._beside_the_key()}"
            )
        return federation

    def training_folder(self, out: Path) -> Path:
        """In the comparison's folder `out`; another one for what is another training, though its record has one key."""
        return out / "trainings" / f"{self.training_key()}-{self._beside_the_key()}"

    def inputs(self) -> str:
        """Hash of the content of all images and labels and of the base weights, wherever they lie."""
        cases = {(site, case) for site, split in self.splits().items() for part in split.values() for case in part}
        contents = sorted([site, case.name, content_hash(case.image), content_hash(case.label)] for site, case in cases)
        return hash_of([contents, weights_checksum(self.bundle, self.settings)])[:16]

    def _beside_the_key(self) -> str:
        """Hash of what the training depends on beside its key: the bundle as it is, the content of the inputs."""
        return hash_of([defaults(self.bundle), bundle_hash(self.bundle), self.inputs()])[:8]

    def shared_folder(self, out: Path) -> Path:
        """The folder whose training other runs share: that of the rounds, or of the whole."""
        shared_rounds = self.federation(out).shared_rounds if self.file.kind == "federated" else None
        return shared_rounds.out if shared_rounds else self.training_folder(out)
