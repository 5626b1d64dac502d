"""The global and the personal model of a site on its test cases, as volumes, in the grid of the original images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.metrics import compute_dice

from pfedsam.bundles import find_bundle, local_settings
from pfedsam.errors import PFedSAMError, first_of_ours

MODELS = ("global", "personal")


@dataclass(frozen=True)
class CaseScore:
    """Dice of one model on one case.

    Attributes:
        site, case: names; they stay at the site.
        model: `global` (experts off) or `personal`.
        dice: for each class; 1 if label and prediction are both empty.
        failed: for each class, whether nothing was found though there is a label.
    """

    site: str
    case: str
    model: str
    dice: tuple[float, ...]
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
    """Label and predictions of a case, `(C, H, W, D)` each, in the grid of the image at `image`."""

    case: str
    image: str
    label: np.ndarray
    predictions: dict[str, np.ndarray]


@dataclass
class SiteEvaluation:
    """What was found at one site; `shown` is the case with the median personal Dice."""

    site: str
    scores: list[CaseScore]
    shown: CasePrediction | None = None

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
    output_dir: str | Path = "runs",
    progress: Callable[[int, int], None] | None = None,
) -> SiteEvaluation:
    """Evaluate both models in a site's model file.

    Args:
        bundle: name of an installed bundle.
        folder: the site folder.
        model_file: `state.safetensors` or `model.safetensors` of the site.
        overrides: listed ids of the bundle's configuration, as in training.
        section: of the split.
        site: name for the scores; the folder's name by default.
        output_dir: where the bundle may write.
        progress: called with (done, total) after each case and model.

    Raises:
        PFedSAMError: E06 if the section has no case, E11 to E13 if the model does not fit, and what the data raise.
    """
    site = site or Path(folder).name
    workflow = _workflow(bundle, folder, model_file, overrides, section, output_dir)
    try:
        workflow.initialize()
        evaluator, network = (workflow.parser.get_parsed_content(id_) for id_ in ("validate#evaluator", "network"))
    except Exception as error:
        raise first_of_ours(error) or error from error
    total = len(MODELS) * len(evaluator.data_loader)
    if not total:
        raise PFedSAMError("E06", f"{folder} has no {section} case.", "Name some in datalist.json, or remove it.")
    found: dict[str, CasePrediction] = {}
    scores: list[CaseScore] = []
    for model in MODELS:

        def keep(engine: Any, model: str = model) -> None:
            for item, output in zip(engine.state.batch, engine.state.output, strict=True):
                scores.append(_score(site, model, item, output, found))
                if progress:
                    progress(len(scores), total)

        network.set_experts(model == "personal")
        with evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep):
            evaluator.run()
    return SiteEvaluation(site, scores, _median_case(scores, found))


def _workflow(bundle: str, folder: Any, model_file: Any, overrides: Any, section: str, output: Any) -> ConfigWorkflow:
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
        **local_settings(overrides),
    )


def _score(site: str, model: str, item: Any, output: Any, found: dict[str, CasePrediction]) -> CaseScore:
    prediction, label = output["pred"].bool(), output["label"].bool()
    dice = compute_dice(prediction[None], label[None], ignore_empty=False)[0]
    wanted, got = label.flatten(1).any(1), prediction.flatten(1).any(1)
    case = str(item["case"])
    image = str(output["label"].meta["filename_or_obj"]) if case not in found else found[case].image
    kept = found.setdefault(case, CasePrediction(case, image, label.cpu().numpy(), {}))
    kept.predictions[model] = prediction.cpu().numpy()
    return CaseScore(site, case, model, tuple(dice.tolist()), tuple((wanted & ~got).tolist()))


def _median_case(scores: list[CaseScore], found: dict[str, CasePrediction]) -> CasePrediction | None:
    personal = sorted((s for s in scores if s.model == MODELS[-1]), key=lambda s: s.mean_dice)
    return found[personal[len(personal) // 2].case] if personal else None
