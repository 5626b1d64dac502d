"""The global and the personal model of a site on its test cases, as volumes, in the grid of the original images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data.utils import affine_to_spacing
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from pfedsam.bundles import class_names, find_bundle, local_settings
from pfedsam.data.expected import label_map_of
from pfedsam.data.known import on_known
from pfedsam.data.seen import Seen, patient_of
from pfedsam.errors import ErrorCode, PFedSAMError, few, first_of_ours
from pfedsam.evaluation.metrics import case_metrics
from pfedsam.networks.model import SegmentAnything
from pfedsam.storage.site_model import SiteModel, read
from pfedsam.training.feature_store import store_settings
from pfedsam.training.left_out import leave_out
from pfedsam.training.precision import slow_precision

MODELS = ("global", "personal")
#: What became of a patient in a section, in words.
_SEEN_IN = {"training": "trained on", "validation": "used for validation"}


@dataclass(frozen=True)
class CaseScore:
    """Dice of one model on one case.

    Attributes:
        site, case: names; they stay at the site.
        model: `global` (experts off) or `personal`.
        dice, hd95, asd, nsd, failed: for each class, see `pfedsam.evaluation.metrics`.
    """

    site: str
    case: str
    model: str
    dice: tuple[float, ...]
    hd95: tuple[float, ...]
    asd: tuple[float, ...]
    nsd: tuple[float, ...]
    failed: tuple[bool, ...]

    @property
    def mean_dice(self) -> float:
        """Mean over the classes."""
        return float(np.mean(self.dice))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CasePrediction:
    """Label and predictions of a case, `(C, H, W, D)` each, in the grid of the file (or DICOM folder) `image`."""

    case: str
    image: Path
    label: np.ndarray
    predictions: dict[str, np.ndarray]


@dataclass
class SiteEvaluation:
    """What was found at one site; `examples` are its best, median and worst case by the personal Dice.

    `section` is that of the split, `class_names` are in the order of the scores (by default numbers).
    """

    site: str
    scores: list[CaseScore]
    examples: dict[str, CasePrediction] = field(default_factory=dict)
    #: Cases that were left out, with the section in which the model has seen their patients.
    excluded: dict[str, str] = field(default_factory=dict)
    #: What a person should know of the numbers; they name cases, so they stay at the site.
    notes: list[str] = field(default_factory=list)
    section: str = "test"
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.class_names and self.scores:
            self.class_names = [f"class {number}" for number, _ in enumerate(self.scores[0].dice, 1)]

    def dice_of(self, case: str, model: str) -> float:
        """Mean Dice of a model on one case."""
        return float(np.mean(list(self.dice_by_class(case, model).values())))

    def dice_by_class(self, case: str, model: str) -> dict[str, float]:
        """Dice of a model on one case, by name of the class."""
        dice = next(score.dice for score in self.scores if score.case == case and score.model == model)
        return dict(zip(self.class_names, dice, strict=True))

    def mean(self, model: str) -> float:
        """Mean Dice of a model over the cases."""
        return float(np.mean([score.mean_dice for score in self.scores if score.model == model]))

    def failures(self, model: str) -> int:
        """Number of cases in which a class that is there was not found at all."""
        return sum(any(score.failed) for score in self.scores if score.model == model)


def evaluate_site(
    bundle: str,
    folder: str | Path,
    model_file: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    section: str = "test",
    site: str | None = None,
    models: Sequence[str] = MODELS,
    ensemble: Sequence[str | Path] = (),
    feature_store: str | Path | None = None,
    output_dir: str | Path = "runs",
    refuse_seen: bool = False,
    progress: Callable[[int, int], None] | None = None,
    network: nn.Module | None = None,
) -> SiteEvaluation:
    """Evaluate both models in a site's model file.

    Test cases of patients that the model has seen are left out, see `pfedsam.data.seen`; in another section they are
    not.

    Args:
        bundle: name of an installed bundle.
        folder: the site folder.
        model_file: `state.safetensors` or `model.safetensors` of the site.
        overrides: listed ids of the bundle's configuration, as in training.
        section: of the split.
        site: name for the scores; the folder's name by default.
        models: which of the two models.
        ensemble: more model files of the same network: their probabilities are averaged with the first's. They are
            other sites' models: what they have seen is not asked, as two sites may have patients of one name.
        feature_store: see `pfedsam.training.site.SiteTrainer`.
        output_dir: where the bundle may write.
        refuse_seen: refuse a section with cases to leave out: for numbers that must be of all its cases.
        progress: called with (done, total) after each case and model.
        network: another one, with `trunk`, `head` and `frozen_trunk`, that predicts in the place of the model's: a
            control, which gets the same pictures and is measured in the same way.

    Raises:
        PFedSAMError: E06 if the section has no case, E08 if no case is left or `refuse_seen` refuses, E11 to E13 if
            the model does not fit, and what the data raise.
    """
    site = site or Path(folder).name
    settings = {**store_settings(feature_store), **local_settings(overrides), **slow_precision(bundle, overrides)}
    if (label_map := label_map_of(folder, bundle)) is not None:
        settings["label_map"] = label_map
    workflow = _workflow(bundle, folder, model_file, settings, section, output_dir)
    try:
        workflow.initialize()
        parsed = workflow.parser.get_parsed_content
        evaluator, own, listed = parsed("validate#evaluator"), parsed("network"), parsed("validate#data_list")
        evaluator.network = network or own
        kept = [read(file) for file in (model_file, *ensemble)]
    except Exception as error:
        raise first_of_ours(error) or error from error
    if not len(evaluator.data_loader):
        raise PFedSAMError(
            ErrorCode.TOO_FEW_CASES, f"{folder} has no {section} case.", "Name some in datalist.json, or remove it."
        )
    known = seen_cases(kept[0], listed, site)
    excluded = known if section == "test" else {}
    _require_unseen(folder, excluded, 1 if refuse_seen else len(listed))
    leave_out(evaluator, listed, [number for number, item in enumerate(listed) if str(item["case"]) in excluded])
    total = len(models) * len(evaluator.data_loader)
    images = {str(item["case"]): Path(item["image"]) for item in listed}
    case_predictions: dict[str, CasePrediction] = {}
    scores: list[CaseScore] = []
    for model in models:

        def keep(engine: Any, model: str = model) -> None:
            for item, output in zip(engine.state.batch, engine.state.output, strict=True):
                score, label, prediction = _score(site, model, str(item["case"]), output)
                kept_case = CasePrediction(score.case, images[score.case], label, {})
                case_predictions.setdefault(score.case, kept_case).predictions[model] = prediction
                scores.append(score)
                if progress:
                    progress(len(scores), total)

        personal = model == "personal"
        if ensemble:
            evaluator.network = Ensemble(own, kept, personal)
        kept[0].use(own, personal)
        with evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep):
            evaluator.run()
    examples, notes = _examples(scores, case_predictions), _notes(kept[0], section, known)
    return SiteEvaluation(site, scores, examples, excluded, notes, section, class_names(find_bundle(bundle)))


def seen_cases(model: SiteModel, listed: Sequence[Mapping[str, Any]], site: str) -> dict[str, str]:
    """The cases of a list whose patients a model has seen, with the section; none if it does not tell."""
    seen = Seen.of(model.info)
    sections = {} if seen is None else {str(item["case"]): seen.section_of(patient_of(item), site) for item in listed}
    return {case: section for case, section in sections.items() if section is not None}


def _require_unseen(folder: str | Path, excluded: Mapping[str, str], too_many: int) -> None:
    if excluded and len(excluded) >= too_many:
        raise PFedSAMError(
            ErrorCode.WRONG_SPLIT,
            f"{len(excluded)} test case(s) of '{folder}' are of patients that the model was trained or validated on: "
            f"{few(excluded)}.",
            "Test on the split that it was trained with (seed, datalist.json), or on new patients.",
        )


def _notes(model: SiteModel, section: str, known: Mapping[str, str]) -> list[str]:
    """What a person should know of the numbers, as sentences."""
    seen = Seen.of(model.info)
    notes = []
    if seen is None:
        notes.append("the model does not say which patients it was trained on")
    elif not seen.whole:
        notes.append("the model goes on from one that did not say which patients it was trained on")
    for what, words in _SEEN_IN.items():
        cases = [case for case, seen_in in known.items() if seen_in == what]
        if cases and section == "test":
            notes.append(f"left out, {len(cases)} test case(s) of patients that were {words}: {', '.join(cases)}")
        elif cases:
            notes.append(f"{len(cases)} of the {section} cases are of patients that were {words}: no test of the model")
    return notes


class Ensemble(nn.Module):
    """Several models of one network; the output is the logit of their mean probability.

    Args:
        network: what they share.
        models: their tensors.
        personal: as personal or as global models.
    """

    def __init__(self, network: SegmentAnything, models: Sequence[SiteModel], personal: bool) -> None:
        super().__init__()
        self.network, self.models, self.personal = network, models, personal
        self.trunk, self.frozen_trunk = network.trunk, network.frozen_trunk

    def head(self, features: Tensor) -> Tensor:
        """Features of the frozen trunk to logits `(B, C, H, W)`."""
        probability = torch.stack([self._of(model, features).sigmoid() for model in self.models]).mean(0)
        return probability.logit(eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images `(B, 3, H, W)`."""
        return self.head(self.trunk(images))

    def _of(self, model: SiteModel, features: Tensor) -> Tensor:
        model.load_into(self.network)
        model.use(self.network, self.personal)
        return self.network.head(features)


def _workflow(bundle: str, folder: Any, model_file: Any, settings: Any, section: str, output: Any) -> ConfigWorkflow:
    configs = find_bundle(bundle) / "configs"
    return ConfigWorkflow(
        config_file=[str(configs / "train.json"), str(configs / "evaluate.json")],
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(configs.parent),
        dataset_dir=str(folder),
        output_dir=str(output),
        model_file=str(model_file),
        section=section,
        **{"validate#handlers": "$[]"},
        **settings,
    )


def _score(site: str, model: str, case: str, output: Any) -> tuple[CaseScore, np.ndarray, np.ndarray]:
    """The score of a case, its label and the prediction, `(C, H, W, D)` each."""
    label, prediction = on_known(output["label"], output["pred"])
    prediction, label = prediction.bool(), label.bool()
    spacing = affine_to_spacing(output["label"].affine, r=label.ndim - 1).tolist()
    found, true = (convert_to_tensor(one, track_meta=False) for one in (prediction, label))
    metrics = case_metrics(found, true, spacing)
    return CaseScore(site, case, model, **vars(metrics)), label.cpu().numpy(), prediction.cpu().numpy()


def _examples(scores: list[CaseScore], predictions: dict[str, CasePrediction]) -> dict[str, CasePrediction]:
    """Best, median and worst case; with fewer than three cases the median, then the worst, is left out."""
    ranked = [s.case for s in sorted(scores, key=lambda s: s.mean_dice) if s.model == scores[-1].model]
    chosen = {"best": ranked[-1], "worst": ranked[0], "median": ranked[len(ranked) // 2]}
    distinct = {case: name for name, case in reversed(chosen.items())}
    return {
        name: predictions[case] for case, name in sorted(distinct.items(), key=lambda pair: list(chosen).index(pair[1]))
    }
