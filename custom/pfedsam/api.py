"""The Python API: train, simulate, compare, evaluate and segment, as the commands do. `pfedsam` re-exports it.

Heavy libraries are imported by the calls that need them. NVFlare is needed by `simulate` and `compare(nvflare=True)`
only. The calls print nothing of their own; MONAI writes its bars and warnings to stderr. Progress goes to the `event`
that a caller gives, a line for each thing that one waits for.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pfedsam.data.suffixes import SUFFIXES
from pfedsam.errors import ErrorCode, PFedSAMError, first_of_ours
from pfedsam.ownership import claim, require_free

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from pfedsam.comparison.run import Run
    from pfedsam.data.picture import Picture
    from pfedsam.deployment.simulation import Simulation
    from pfedsam.evaluation.site import SiteEvaluation
    from pfedsam.inference.predict import Prediction, Predictor
    from pfedsam.storage.site_model import SiteModel
    from pfedsam.storage.state import StateEntry

Which = Literal["personal", "global"]
#: A path, or values; see `Model.segment`.
Image: TypeAlias = "str | os.PathLike[str] | NDArray[Any]"
Event: TypeAlias = Callable[[str], None]

DEFAULT_BUNDLE = "brain_lesion_mri"
DEFAULT_STRATEGIES = ("local_only", "fedavg_lora", "fedavg_lora_ft", "feddpa", "pfedsam")
#: What `train_site` writes in its folder.
MODEL_FILE = "model.safetensors"
#: What an image without a file is called.
_ARRAY = "<array>"
_LAYOUT = "Give (x, y, z) for a volume, (x, y) for a grey and (x, y, 3) of type uint8 for a colour picture."
_MODELS = "Give a site's model file, the folder of a training or a finished run, or a state folder."


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a model found in one image; `(x, y[, z])` below is the image's own grid, with the shape of its file.

    Attributes:
        prediction: the image and the probabilities as the writers of `pfedsam.inference` take them.
        class_names: names of the classes; label value n is the n-th.
    """

    prediction: Prediction = field(repr=False)
    class_names: tuple[str, ...]

    @cached_property
    def label(self) -> NDArray[np.uint8]:
        """`(x, y[, z])`: 0 is background, n the n-th class; of nested classes the inner one."""
        return self.prediction.label().reshape(self.prediction.image.label_shape)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """`(C, x, y[, z])`, 0 to 1: one map for each class."""
        found = self.prediction.probabilities
        return found.reshape(len(found), *self.prediction.image.label_shape)

    @property
    def affine(self) -> NDArray[np.float64] | None:
        """`(4, 4)`, voxel indices to millimetres (right, anterior, superior); None if the image has none."""
        return self.prediction.image.affine

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the image was read, and of the part that the bundle does not see."""
        from pfedsam.data.field_of_view import told

        found = self.prediction
        side, unseen = found.field_of_view, found.share_unseen
        return (*found.remarks, *((told(unseen, side),) if side is not None and unseen >= 0.005 else ()))

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the label map, with the geometry of the image: NIfTI (`.nii.gz`), of a picture PNG.

        Args:
            path: file to write; without an ending it gets the right one.
            force: replace a file that is there.

        Returns:
            The file written.

        Raises:
            PFedSAMError: E16 for the ending of another format, E24 if the file is there, or is the image itself.

        Example:
            >>> model.segment("scan.nii.gz").save("results/scan_lesion.nii.gz")  # doctest: +SKIP
        """
        from pfedsam.inference.writers import LABEL, PICTURE, write_label

        image, path = self.prediction.image, Path(path)
        ending = PICTURE if image.kind == "picture" else LABEL
        stem = path.name[: -len(ending)] if path.name.endswith(ending) else path.name
        if stem.lower().endswith(SUFFIXES):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"'{path}' has the ending of another format.", f"Let it end in {ending}."
            )
        require_free(path.with_name(stem + ending), force, keep=[image.source])
        return write_label(self.label, image, path.with_name(stem))


@dataclass(frozen=True, eq=False)
class Model:
    """A site's model, ready for images; `load_model` makes it.

    Attributes:
        file: the model file.
        site: name of the site, None where the path does not tell it.
        which: the `personal` or the `global` model.
        class_names: names of the classes; label value n is the n-th.
    """

    file: Path
    site: str | None
    which: Which
    class_names: tuple[str, ...]
    predictor: Predictor = field(repr=False)

    @property
    def bundle(self) -> str:
        """Name of the bundle."""
        return self.predictor.bundle

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the bundle that the network was built with, where they are not the bundle's own."""
        return dict(self.predictor.settings)

    def segment(
        self, image: Image, box: Sequence[int] | None = None, affine: NDArray[Any] | None = None
    ) -> Segmentation:
        """Segment one image.

        Args:
            image: the path of a NIfTI, PNG, JPEG, TIFF or DICOM file or of a folder with one DICOM series; or an array:
                `(x, y, z)`: a volume; `(x, y)`: a grey picture, or with an affine a single slice; `(x, y, 3)`, uint8
                and without an affine: a colour picture. The first axis of a picture points right, the second down, so
                it is `np.asarray(picture).swapaxes(0, 1)` of a Pillow image. Values are in the unit of the modality.
            box: first and last voxel along each axis of the image, `(x0, x1, y0, y1[, z0, z1])`: what is to be
                segmented lies inside. For models that were trained with boxes.
            affine: of an array, `(4, 4)`: voxel indices to millimetres (right, anterior, superior). Without it the
                voxels of a volume are cubes of 1 mm, and its axes point right, anterior and superior.

        Returns:
            The label map and the probabilities in the grid of the image.

        Raises:
            PFedSAMError: E02 if there is no such image, E05 if it cannot be read or an array has another shape or type,
                E09 for values that are not finite, E16 for a box that is not inside, E32 for a box or an affine that
                does not go with the model or the image.
            TypeError: if `image` is neither a path nor an array.

        Example:
            >>> found = model.segment(values, affine=affine)  # doctest: +SKIP
            >>> found.label.shape == values.shape  # doctest: +SKIP
            True
        """
        import numpy as np

        if isinstance(image, np.ndarray):
            found = _of_picture(self.predictor, picture_of(image, affine), box)
        elif not isinstance(image, (str, os.PathLike)):
            raise TypeError(f"an image is a path or an array, not {type(image).__name__}")
        elif affine is not None:
            told = f"an affine is for an array, and {image} is a path."
            raise PFedSAMError(ErrorCode.CONTRADICTION, told, "Leave it out: the file has its own.")
        else:
            found = self.predictor(Path(image), box)
        return Segmentation(found, self.class_names)

    def segment_many(self, images: Iterable[Image]) -> Iterator[Segmentation]:
        """Segment images one after the other; each is read when its result is asked for, so memory holds one.

        An image that goes wrong raises and ends it: call `segment` for each image to go on with the others.

        Args:
            images: as `segment` takes them; may be a generator.

        Yields:
            The result of each image, in order.

        Raises:
            PFedSAMError: as `segment`.

        Example:
            >>> for found in model.segment_many(sorted(Path("scans").glob("*.nii.gz"))):  # doctest: +SKIP
            ...     found.save(Path("results") / found.prediction.image.source.name)
        """
        for image in images:
            yield self.segment(image)


def load_model(
    path: str | os.PathLike[str],
    site: str | None = None,
    which: Which = "personal",
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
    *,
    bundle: str | None = None,
    checkpoint: str | None = None,
) -> Model:
    """Load a site's model. Bundle and settings are those that the model file names.

    Args:
        path: a model file (`state.safetensors`, `best.safetensors`, an exported one); the folder of a training that
            holds `model.safetensors`; the run folder of `pfedsam simulate`; a site's state folder; or a state root.
        site: which site of a run or state root; may be left out if there is one only, or for a global model that is the
            same at all sites.
        which: `personal`, or `global` for the model that all sites share (experts off).
        overrides: settings of the bundle that come before those of the file.
        device: a torch device, as `cpu` or `cuda:1`; by default the bundle's choice, the first GPU if there is one.
        bundle: name of an installed bundle; by default what the file names.
        checkpoint: path of the base weights on this machine; by default `PFEDSAM_CHECKPOINT`, else the bundle's.

    Raises:
        PFedSAMError: E13 if there is no readable model, or no such site (the sentence lists the sites); E10 to E12 if
            the base weights or tensors do not fit; E16 for a device that is not there; E18, E28, E30 or E32 for
            settings or names that are wrong, or do not go together.

    Example:
        >>> model = pfedsam.load_model("runs/mine", site="hospital_a")  # doctest: +SKIP
        >>> model.segment("scan.nii.gz").save("scan_lesion.nii.gz")  # doctest: +SKIP
    """
    if which not in ("personal", "global"):
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"there is no '{which}' model.", "Take personal or global.")
    file, found = _model_file(Path(path), site, which)

    from pfedsam.bundles import class_names, find_bundle
    from pfedsam.inference.predict import Predictor

    personal = which == "personal"
    predictor = Predictor(file, bundle=bundle, overrides=overrides, checkpoint=checkpoint, experts=personal)
    predictor.open()
    _complete(predictor, personal, device)
    return Model(file, found, which, tuple(class_names(find_bundle(predictor.bundle))), predictor)


def train_site(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] = "runs/train_site",
    *,
    bundle: str = DEFAULT_BUNDLE,
    strategy: str = "local_only",
    rounds: int = 6,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    force: bool = False,
    event: Event | None = None,
) -> SiteModel:
    """Train one site alone. Nothing is sent, and NVFlare is not needed.

    The model is written to `<out>/model.safetensors`, for `load_model(out)`. A training that was stopped goes on after
    its last round when it is called again with the same arguments.

    Args:
        folder: site folder, with `images` and `labels`.
        out: folder to write to; it stays at the site.
        bundle: name of an installed bundle.
        strategy: name or `.json` file of a strategy of kind `local`.
        rounds: number of rounds, each with the epochs that the strategy says; its final phase follows.
        seed: of the draws; the test fold is `seed` modulo `folds`.
        settings: overrides of the bundle, see `pfedsam settings`.
        device: `auto`, or a torch device.
        force: replace a model that is in `out`, or write into a folder that is not ours.
        event: called with a line after each round.

    Returns:
        The site's model, as it was written.

    Raises:
        PFedSAMError: E02 to E09 for what is wrong with the site's data, E10 for base weights, E18, E28, E30 or E32 for
            wrong settings or names, E24 if `out` holds a model already or is not ours.

    Example:
        >>> pfedsam.train_site("data/hospital_a", "runs/hospital_a", rounds=3)  # doctest: +SKIP
        >>> pfedsam.load_model("runs/hospital_a").segment("scan.nii.gz")  # doctest: +SKIP
    """
    from pfedsam.bundles import require_settings
    from pfedsam.comparison.run import Run
    from pfedsam.storage.site_model import read
    from pfedsam.training.catalogue import find_strategy
    from pfedsam.training.federation import run_federation

    folder, out = Path(folder).resolve(), Path(out)
    file = find_strategy(strategy)
    if file.kind != "local":
        told = f"'{strategy}' does not train a site alone: it is of kind '{file.kind}'."
        raise PFedSAMError(ErrorCode.CONTRADICTION, told, "Take local_only, or call simulate or compare.")
    require_settings(bundle, {**(settings or {}), **file.overrides})
    _require_site(folder, bundle, seed, {**(settings or {}), **file.overrides})
    claim(out, "site training", force)
    require_free(out / MODEL_FILE, force)
    # a run of one site: its folder in `out` is named by all that the training depends on
    run = Run(str(folder.parent), (folder.name,), bundle, strategy, seed, rounds, dict(settings or {}))
    federation = replace(run.federation(out), settings={"device": device})
    run_federation(federation, event, aggregated=False)
    model = read(federation.model_of(folder.name))
    model.moments = {}
    model.save(out / MODEL_FILE)
    return model


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """What a simulated federation gave.

    Attributes:
        out: the run folder.
        global_model: file of the last global model.
        states: model file of each site.
        results: the numbers as JSON, which `pfedsam report` shows.
        dice: one row for each site, by name: `cases`, mean Dice `global` and `personal` over its test cases, `gain`.
        cases: one row for each case, model and class, see `evaluate`.
    """

    out: Path
    global_model: Path
    states: dict[str, Path]
    results: Path
    dice: pd.DataFrame = field(repr=False)
    cases: pd.DataFrame = field(repr=False)


def simulate(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    bundle: str | None = None,
    strategy: str | None = None,
    rounds: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    validate_every: int | None = None,
    job: str = "pfedsam",
    federation: str = "simulation",
    fresh: bool = False,
    force: bool = False,
    event: Event | None = None,
) -> SimulationResult:
    """Simulate a federation with NVFlare on this machine, then evaluate both models of every site.

    In a folder that holds a run it goes on with that run, or evaluates it again, if all that decides the result is the
    same. It starts processes of its own, which end with this one.

    Args:
        data: folder that holds the site folders.
        out: run folder; by default `runs/simulation-<time>`.
        bundle: name of an installed bundle; by default the job's.
        strategy: name or `.json` file of a federated strategy; by default the job's.
        rounds: rounds in all; by default the job's.
        seed: of the draws; the test fold is `seed` modulo `folds`.
        settings: overrides of the bundle, see `pfedsam settings`.
        validate_every: validate the global model every so many rounds; by default the job's.
        job: name of a packaged job, or a job folder.
        federation: name of the federation: the states of the sites are keyed by it.
        fresh: move a run that is in `out` aside first.
        force: write into a folder that is not ours.
        event: called with a line for each thing that one waits for.

    Raises:
        PFedSAMError: E02 if there are fewer than two sites, E06 if one cannot be split, E14 if another process works in
            `out`, E18, E28 or E32 for wrong settings or names, E24 if `out` is not ours, E25 if it holds another run;
            else of the first site that failed.

    Example:
        >>> found = pfedsam.simulate("data", "runs/mine", rounds=6)  # doctest: +SKIP
        >>> found.dice.gain.min()  # doctest: +SKIP
    """
    from pfedsam.deployment.simulation import begin_anew, require_splits, run
    from pfedsam.storage.run_folder import claim_run, is_simulation

    out = Path(out or f"runs/simulation-{time.strftime('%Y%m%d-%H%M%S')}")
    told = {"seed": seed, **(settings or {})}
    with planned_simulation(
        Path(data), out, job, strategy, federation, bundle, rounds, told, validate_every
    ) as simulation:
        require_splits(simulation)
        claim_run(out, "simulation", is_simulation, force)
        if fresh:
            begin_anew(simulation)
        run(simulation, event)
        return _result(simulation)


@contextmanager
def planned_simulation(
    data: Path,
    out: Path,
    job: str = "pfedsam",
    strategy: str | None = None,
    federation: str = "simulation",
    bundle: str | None = None,
    rounds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    validate_every: int | None = None,
) -> Iterator[Simulation]:
    """A simulation whose settings are checked, and whose job lasts as long as the block; see `simulate`.

    Raises:
        PFedSAMError: E18 or E28 for wrong settings or names, E32 for a strategy that needs no server.
    """
    from pfedsam.bundles import require_settings
    from pfedsam.deployment.jobs import find_job, make_job, plan_settings
    from pfedsam.deployment.simulation import Simulation
    from pfedsam.training.catalogue import find_strategy

    plan = plan_settings(find_job(job))
    brought = (plan.get("overrides") or {}) if strategy is None else find_strategy(strategy).overrides
    require_settings(bundle or plan["bundle"], {**brought, **(overrides or {})})
    every = {} if validate_every is None else {"validate_every": validate_every}
    with tempfile.TemporaryDirectory() as scratch:
        # not in the run folder: it may be another run's
        made = str(make_job(strategy, Path(scratch) / "job", job)) if strategy else job
        yield Simulation(data, out, made, federation, bundle, rounds, dict(overrides or {}), every)


def compare(
    data: str | os.PathLike[str],
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
    seeds: Sequence[int] = (0,),
    *,
    out: str | os.PathLike[str] = "runs/compare",
    bundle: str = DEFAULT_BUNDLE,
    rounds: int = 6,
    settings: Mapping[str, Any] | None = None,
    validate_every: int = 3,
    unseen: bool = False,
    nvflare: bool = False,
    aggregation: str | None = None,
    workers: int = 0,
    records: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    force: bool = False,
    event: Event | None = None,
) -> pd.DataFrame:
    """Compare strategies on the same sites, splits and budget. What has a record is not run again.

    Every run is a process of its own, so a script that calls it needs `if __name__ == "__main__":`.

    Args:
        data: folder that holds the site folders.
        strategies: names of strategies or ablations, or `.json` files.
        seeds: of splits and draws; the test fold is the seed modulo `folds`.
        out: folder of trainings and records.
        bundle: name of an installed bundle.
        rounds: of every federation.
        settings: overrides of the bundle, see `pfedsam settings`; those of a strategy come before them.
        validate_every: validate the global model every so many rounds.
        unseen: leave one site out in turn, as a new hospital.
        nvflare: train with NVFlare's simulator what needs a server.
        aggregation: rule of the server for strategies that name none.
        workers: runs at a time, one thread each; 0: one a core.
        records: file of the records; by default `<out>/runs.jsonl`.
        fresh: run again what has a record of other data, weights or bundle than there are now.
        force: write into a folder that is not ours.
        event: called with a line for each thing that one waits for.

    Returns:
        One row for each case, model and run: `strategy`, `seed`, `held_out`, `site`, `case`, `patient` (hashes),
        `model`, `dice`, `hd95`, `asd` (mm), `nsd`, `failed`; the classes' mean.

    Raises:
        PFedSAMError: E02 if there is no site; E16, E18, E28 or E32 for wrong settings or names; E24 for an `out` that
            is not ours; E25 if records are of something else than there is now; else, after all runs, the code of the
            first that failed. What is done is kept: the next call goes on.

    Example:
        >>> rows = pfedsam.compare("data", ["local_only", "pfedsam"], seeds=[0, 1, 2])  # doctest: +SKIP
        >>> rows[rows.model == "personal"].groupby("strategy").dice.mean()  # doctest: +SKIP
    """
    from pfedsam.comparison.compare import Comparison
    from pfedsam.comparison.compare import compare as run_all
    from pfedsam.comparison.records import problem_of_record
    from pfedsam.comparison.statistics import case_table
    from pfedsam.storage.run_folder import claim_run, is_comparison

    out, tell = Path(out), event or (lambda line: None)
    more = {"validate_every": validate_every, "simulator": nvflare, "aggregation": aggregation}
    runs = planned_runs(Path(data), strategies, seeds, rounds, bundle, settings or {}, unseen, **more)
    comparison = Comparison(runs, out, None if records is None else Path(records), fresh=fresh)
    if nvflare:
        from pfedsam.deployment.nvflare_runner import run_simulated

        comparison.simulator = run_simulated
    if not fresh and (outdated := comparison.outdated()):
        told = "; ".join(f"other {what} for {', '.join(names)}" for what, names in outdated.items())
        raise PFedSAMError(
            ErrorCode.OTHER_RUN,
            f"{comparison.record_file} does not tell of what is here now: {told}.",
            "fresh=True runs them again, another `records` keeps both.",
        )
    claim_run(out, "comparison", is_comparison, force)
    run_all(comparison, workers or os.cpu_count() or 1, lambda line, count: tell(line))
    if comparison.failed:
        raise _failure(comparison.failed, len(runs))
    return case_table([record for record in comparison.records() if not problem_of_record(record)])


def planned_runs(
    data: Path,
    strategies: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    bundle: str,
    overrides: Mapping[str, Any],
    unseen: bool = False,
    **common: Any,
) -> list[Run]:
    """The runs of a comparison, checked: each strategy on each seed, and with `unseen` without each site in turn.

    Args:
        data: folder that holds the site folders.
        strategies, seeds, rounds, bundle, overrides, unseen: see `compare`.
        common: what else all runs have, see `pfedsam.comparison.run.Run`.

    Raises:
        PFedSAMError: E02 if there is no site; E16, E18, E28 or E32 for wrong settings or names.
    """
    from pfedsam.bundles import require_settings
    from pfedsam.comparison.run import Run
    from pfedsam.data.sites import site_names
    from pfedsam.ranges import LARGEST_SEED
    from pfedsam.training.catalogue import find_strategy

    sites = site_names(data)
    if not sites:
        told = f"{data} holds no site folder."
        raise PFedSAMError(ErrorCode.SITE_FOLDER, told, "Lay it out as <data>/<site>/images and <data>/<site>/labels.")
    wrong = [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]
    if wrong:
        told = f"seed(s) {wrong} are not from 0 to {LARGEST_SEED}."
        raise PFedSAMError(ErrorCode.WRONG_SETTING, told, "Give others.")
    for name in strategies:
        require_settings(bundle, {**overrides, **find_strategy(name).overrides})
    require_own_names(strategies)
    runs = [
        Run(str(data.resolve()), sites, bundle, name, seed, rounds, dict(overrides), held_out=held_out, **common)
        for seed in seeds
        for held_out in (sites if unseen else (None,))
        for name in strategies
    ]
    for run in runs:
        run.check()
        run.file.checked()  # an error for a rule that there is not
    return runs


def require_own_names(strategies: Sequence[str]) -> None:
    """Refuse two strategies of one name: records and tables could not tell them apart.

    Raises:
        PFedSAMError: E32 naming both.
    """
    from pfedsam.training.catalogue import ablation_names, find_strategy, strategy_name, strategy_names

    known = {name: name for name in (*strategy_names(), *ablation_names())}
    for path in strategies:
        name = strategy_name(path)
        other = known.setdefault(name, path)
        if other != path and find_strategy(other) != find_strategy(path):
            told = f"'{path}' and '{other}' are two strategies named '{name}'."
            raise PFedSAMError(ErrorCode.CONTRADICTION, told, "Give each a `name` of its own.")


def evaluate(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | Model,
    *,
    section: str = "test",
    bundle: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Compare the global and the personal model in a site's model file with the site's labels, as whole volumes.

    Test cases of patients that the model has seen are left out; `attrs["notes"]` of the table says which.

    Args:
        folder: site folder.
        model: as `load_model` takes it, or a loaded model; of a run folder it is the site named as `folder`.
        section: `training`, `validation` or `test`.
        bundle, overrides: see `load_model`.

    Returns:
        One row for each case, model and class: `site`, `case`, `model`, `class`, `dice`, `hd95` and `asd` (mm), `nsd`,
        `failed` (the class is there and nothing was found).

    Raises:
        PFedSAMError: E02 to E09 for the data, E06 if the section has no case, E08 if no case is left, E10 to E13 if the
            model does not fit.

    Example:
        >>> rows = pfedsam.evaluate("data/hospital_a", "runs/mine")  # doctest: +SKIP
        >>> rows.groupby("model").dice.mean()  # doctest: +SKIP
    """
    from pfedsam.evaluation.site import evaluate_site
    from pfedsam.storage.site_model import model_settings

    folder = Path(folder)
    site = folder.resolve().name
    if isinstance(model, Model):
        file, overrides = model.file, {**model.settings, **(overrides or {})}
        bundle = bundle or model.bundle
    else:
        path = Path(model)
        file, _ = _model_file(path, None if _only_model(path) else site, "personal")
    bundle, told = model_settings(file, bundle, overrides or {})
    with tempfile.TemporaryDirectory() as scratch:
        found = evaluate_site(bundle, folder, file, overrides=told, section=section, site=site, output_dir=scratch)
    rows = _case_rows([found], bundle)
    rows.attrs["notes"] = found.notes
    return rows


# ---- models and images --------------------------------------------------------------------------------------------


def _model_file(path: Path, site: str | None, which: Which) -> tuple[Path, str | None]:
    """The model file that a path means, and its site if that is known."""
    one = _only_model(path)
    if one is None:
        entry = _entry(path / "state" if (path / "state").is_dir() else path, site, which)
        return entry.file, entry.site
    known = None if one == path or one.name == MODEL_FILE else path.resolve().parent.name
    if site not in (None, known):
        told = f"{one} is the model of one site, so '{site}' cannot be looked for in it."
        raise PFedSAMError(ErrorCode.CONTRADICTION, told, "Leave the site out, or give the folder of the run.")
    return one, known


def _only_model(path: Path) -> Path | None:
    """The file of a path that means one model, None for a folder that may hold those of several sites."""
    from pfedsam.storage.state import CURRENT, PREVIOUS

    if not path.is_dir():
        return path
    return next((path / name for name in (CURRENT, PREVIOUS, MODEL_FILE) if (path / name).is_file()), None)


def _entry(root: Path, site: str | None, which: Which) -> StateEntry:
    """The state under a root that is meant (E13 with the sites that there are)."""
    from pfedsam.storage.state import list_states, newest_states

    entries = list_states(root)
    if not entries:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{root} holds no model.", _MODELS)
    listed = f"There are: {', '.join(sorted({entry.site for entry in entries}))}."
    found = [entry for entry in entries if site in (None, entry.site)]
    if not found:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{root} holds no model of site '{site}'.", listed)
    sites, federations = {entry.site for entry in found}, sorted({entry.federation for entry in found})
    if len(federations) > 1:
        told = f"{root} holds models of {len(federations)} federations: {', '.join(federations)}."
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, told, "Give the state folder of one, or a file.")
    if len(sites) > 1 and (which == "personal" or any(map(_own_groups, found))):
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE, f"{root} holds models of {len(sites)} sites.", f"Name one. {listed}"
        )
    newest = [entry for name, entry in newest_states(root, federations[0]).items() if name in sites]
    if not newest:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, found[0].problem, "Give a file of a backup.")
    return max(newest, key=lambda entry: (entry.info.get("round") or 0, entry.info.get("final") is True))


def _own_groups(entry: StateEntry) -> set[str]:
    """Groups of a site's tensors, beside the experts, that are in the site's global model and in no other's."""
    roles = entry.info.get("roles")
    personal = roles.get("personal") if isinstance(roles, dict) else None
    return set(personal or ()) - {"experts"}


def picture_of(values: NDArray[Any], affine: NDArray[Any] | None = None) -> Picture:
    """An array as an image that was read; see `Model.segment` for what it may be.

    Raises:
        PFedSAMError: E05 for another shape, type or affine, E09 for values that are not finite.
    """
    import numpy as np

    from pfedsam.data.formats.flat import WHITE_16
    from pfedsam.data.picture import Picture

    name, shape = Path(_ARRAY), list(values.shape)
    flat = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8)
    if values.size == 0 or values.dtype.kind not in "buif" or values.ndim not in (2, 3):
        raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"the array is {values.dtype}{shape}.", _LAYOUT)
    if not np.isfinite(values).all():
        told = "the array holds values that are not finite (NaN or infinity)."
        raise PFedSAMError(ErrorCode.SITE_DATA, told, "Replace these values.")
    if affine is None and flat:
        white = {"uint8": 255.0, "uint16": float(WHITE_16)}.get(values.dtype.name)
        return Picture(values, "picture", name, white=white)
    if affine is None:
        if values.shape[2] == 3:
            told = f"the array is {values.dtype}{shape}: three slices, or colours that are not of type uint8."
            raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, told, "Give a volume its affine, colours the type uint8.")
        return Picture(values, "volume", name, notes=("it has no affine: its voxels are taken as cubes of 1 mm",))
    place = np.asarray(affine, dtype=np.float64)
    if place.shape != (4, 4) or not np.isfinite(place).all() or abs(np.linalg.det(place)) < 1e-12:
        told = f"the affine maps no volume: {place.tolist()}."
        raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, told, "Give (4, 4): voxel indices to millimetres.")
    stored = tuple(values.shape) if values.ndim == 2 else ()
    return Picture(values.reshape(*values.shape, *(1,) * (3 - values.ndim)), "volume", name, place, stored)


def _of_picture(predictor: Predictor, picture: Picture, box: Sequence[int] | None) -> Prediction:
    """As the predictor's own call, for an image that was read already."""
    from pfedsam.inference.predict import Prediction

    if box is not None and not predictor.settings.get("box_probability"):
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            "a box is for a model that was trained with boxes.",
            "Train it with box_probability=0.5, or leave the box out.",
        )
    try:
        return Prediction(picture, predictor._probabilities(picture, box), predictor.field_of_view)
    except Exception as error:
        told = f"the array went wrong: {type(error).__name__}: {error}."
        raise first_of_ours(error) or PFedSAMError(ErrorCode.UNREADABLE_IMAGE, told, "Look at it first.") from error


def _complete(predictor: Predictor, personal: bool, device: str | None) -> None:
    """Put a site's copy of the shared tensors in their place, and the network on a device."""
    import torch

    from pfedsam.storage.site_model import read

    evaluator = predictor._evaluator
    # the bundle's own workflow turns the experts on or off, and knows no copy
    read(predictor.model_file).use(evaluator.network, personal)
    if device is None:
        return
    try:
        place = torch.device(device)
        evaluator.network.to(place)
    except (RuntimeError, AssertionError) as error:
        told = f"the device '{device}' cannot be used: {str(error).splitlines()[0]}"
        raise PFedSAMError(ErrorCode.WRONG_SETTING, told, "Take cpu, or a GPU that torch sees.") from None
    evaluator.state.device = place


# ---- results ------------------------------------------------------------------------------------------------------


def _require_site(folder: Path, bundle: str, seed: int, settings: Mapping[str, Any]) -> None:
    """Refuse a site with an error in its data (E02 to E09), before anything is written."""
    from pfedsam.bundles import class_names, field_of_view, find_bundle, is_rgb
    from pfedsam.data.checks import check_site
    from pfedsam.data.site_report import require_valid
    from pfedsam.data.transforms import class_numbers

    root = find_bundle(bundle)
    seen, labels = field_of_view(bundle, settings), list(class_numbers(class_names(root)))
    folds = int(settings.get("folds", 3))
    require_valid(check_site(folder, labels, seed=seed, folds=folds, colour=is_rgb(root), field_of_view=seen))


def _result(simulation: Simulation) -> SimulationResult:
    """Evaluate the sites of a run, write `results.json`, and tell where all is."""
    import pandas as pd

    from pfedsam.deployment.simulation import sent_bytes
    from pfedsam.evaluation.site import evaluate_site
    from pfedsam.evaluation.tables import results

    out, bundle, overrides = simulation.out, simulation.plan["bundle"], simulation.settings
    states = {site: entry.file for site, entry in sorted(simulation.states().items())}
    evaluations = [
        evaluate_site(bundle, simulation.data / site, file, overrides=overrides, site=site, output_dir=out)
        for site, file in states.items()
    ]
    about = {"bundle": bundle, "overrides": dict(overrides), "section": "test"}
    table = {"about": about, **results(evaluations, sent_bytes(simulation))}
    file = out / "results.json"
    file.write_text(json.dumps(table, indent=2) + "\n")
    rows = {
        site: {"cases": one["cases"], "global": one["dice_global"], "personal": one["dice_personal"]}
        for site, one in table["sites"].items()
    }
    dice = pd.DataFrame.from_dict(rows, orient="index").assign(gain=lambda found: found["personal"] - found["global"])
    cases = _case_rows(evaluations, bundle)
    return SimulationResult(out, simulation.global_model, states, file, dice.rename_axis("site"), cases)


def _case_rows(evaluations: Sequence[SiteEvaluation], bundle: str) -> pd.DataFrame:
    """One row for each case, model and class."""
    import pandas as pd

    from pfedsam.bundles import class_names, find_bundle

    metrics = ("dice", "hd95", "asd", "nsd", "failed")
    rows = [
        {
            "site": score.site,
            "case": score.case,
            "model": score.model,
            "class": name,
            **{metric: getattr(score, metric)[number] for metric in metrics},
        }
        for one in evaluations
        for score in one.scores
        for number, name in enumerate(class_names(find_bundle(bundle)))
    ]
    return pd.DataFrame(rows, columns=["site", "case", "model", "class", *metrics])


def _failure(failed: Mapping[str, str], runs: int) -> PFedSAMError:
    """One error for the runs that failed, with the code of the first."""
    first = next(iter(failed.values())).partition(":")[0]
    code = ErrorCode(first) if first in {one.value for one in ErrorCode} else ErrorCode.UNEXPECTED
    told = "; ".join(f"{name}: {problem}" for name, problem in failed.items())
    return PFedSAMError(code, f"{len(failed)} of {runs} runs failed: {told}", "The others are kept: call it again.")
