"""Images through a bundle's own inference workflow, one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from numpy.typing import NDArray

from pfedsam.bundles import find_bundle, is_rgb, local_settings
from pfedsam.data.transforms import WHITE, class_map
from pfedsam.errors import PFedSAMError, first_of_ours
from pfedsam.inference.formats import Input, read_input, write_label
from pfedsam.inferers import PromptedSliceInferer
from pfedsam.networks.prompts import boxes_of
from pfedsam.site_model import model_settings


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: as it was read.
        probabilities: `(C, x, y[, z])` in the grid of the image.
    """

    image: Input
    probabilities: NDArray[np.float32]

    def label(self, threshold: float = 0.5) -> NDArray[np.uint8]:
        """Values `(x, y[, z])`: 0, or the number of the last class above the threshold (nested classes: the inner)."""
        return class_map(torch.from_numpy(self.probabilities), threshold).numpy()


def predict(
    model_file: str | Path,
    images: Sequence[Path],
    each: Callable[[Prediction], None],
    *,
    bundle: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    experts: bool = True,
    box: Sequence[int] | None = None,
) -> None:
    """Predict images one after the other; memory holds one volume at a time.

    Args:
        model_file: of a site: its state, an exported model, or what a bundle's training wrote.
        images: see `pfedsam.inference.formats.read_input`.
        each: called with the prediction of each image, in their order.
        bundle: name of an installed bundle; by default what the model names.
        overrides: of the bundle, as in training; by default what the model was trained with.
        checkpoint: see `pfedsam.bundles.local_settings`.
        experts: the personal model, or with False the global one.
        box: first and last voxel along each axis of the one image, `(x0, x1, y0, y1[, z0, z1])`: what is to be
            segmented lies inside. For models that were trained with boxes.

    Raises:
        PFedSAMError: E02, E05 or E09 for an image, E10 to E13 for a model that does not fit, E16 or E18 for wrong
            settings.
    """
    name, settings = model_settings(model_file, bundle, overrides or {})
    if box is not None and (len(images) != 1 or not settings.get("box_probability")):
        raise PFedSAMError(
            "E16",
            "a box is for one image, and for a model that was trained with boxes.",
            "Train it with --set box_probability=0.5, or leave the box out.",
        )
    names = [path.name for path in images]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise PFedSAMError("E09", f"several images are named {twice}: results would overwrite each other.", "Rename.")
    with tempfile.TemporaryDirectory(prefix="pfedsam-") as scratch:
        inputs = [read_input(path, Path(scratch), is_rgb(find_bundle(name))) for path in images]
        evaluator = _evaluator(name, model_file, inputs, scratch, local_settings(settings, checkpoint), experts)
        if box is not None:
            evaluator.inferer = _prompted(evaluator, inputs[0], box, Path(scratch))
        waiting = iter(inputs)

        def hand_over(engine: Any) -> None:
            for output in engine.state.output:
                each(Prediction(next(waiting), np.asarray(output["pred"].detach().cpu(), dtype=np.float32)))

        evaluator.add_event_handler(Events.ITERATION_COMPLETED, hand_over)
        try:
            evaluator.run()
        except Exception as error:
            at = next(waiting, None)
            raise first_of_ours(error) or PFedSAMError(
                "E05",
                f"{at.source if at else 'an image'} went wrong: {type(error).__name__}: {error}.",
                "Look at it first.",
            ) from error


def _prompted(evaluator: Any, image: Input, box: Sequence[int], scratch: Path) -> PromptedSliceInferer:
    """The bundle's slice inferer with the box as a prompt: the box goes the way of the image, as a mask of its own."""
    inside = np.zeros(image.shape, dtype=np.uint8)
    pairs = list(zip(box[::2], box[1::2], strict=True))
    sizes = image.shape[: len(pairs)]
    if not all(0 <= first <= last < size for (first, last), size in zip(pairs, sizes, strict=True)):
        raise PFedSAMError("E16", f"the box {list(box)} is not inside {list(sizes)}.", "Give x0,x1,y0,y1[,z0,z1].")
    inside[tuple(slice(first, last + 1) for first, last in pairs)] = WHITE
    path = write_label(inside, image, scratch / "box")
    volume = evaluator.data_loader.dataset.transform({"image": str(path)})["image"]
    # the middle channel is the slice itself; a scale by percentiles leaves 0 and the largest value apart
    masks = volume[1] > 0.5 * max(float(volume[1].max()), 1e-6)
    inferer = evaluator.inferer
    return PromptedSliceInferer(
        boxes_of(masks.permute(2, 0, 1)[:, None]),
        roi_size=inferer.roi_size,
        sw_batch_size=inferer.sw_batch_size,
        spatial_dim=inferer.spatial_dim,
    )


def _evaluator(
    bundle: str, model_file: str | Path, inputs: Sequence[Input], scratch: str, settings: dict[str, Any], experts: bool
) -> Any:
    """The bundle's evaluator on these images, which gives probabilities and writes nothing."""
    root = find_bundle(bundle)
    config = root / "configs" / "inference.json"
    parser = ConfigParser()
    parser.read_config(str(config))
    steps = parser.get("postprocessing")["transforms"]
    nothing = {"_target_": "Identityd", "keys": "pred"}
    silent: dict[str, Any] = {
        f"postprocessing#transforms#{number}": nothing
        for number, step in enumerate(steps)
        if step["_target_"].rsplit(".", 1)[-1] in ("AsDiscreted", "ClassNumbersd", "SaveImaged")
    }
    known = set(parser.get())
    workflow = ConfigWorkflow(
        config_file=str(config),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(root),
        dataset_dir=scratch,
        output_dir=scratch,
        model_file=str(model_file),
        experts_on=experts,
        datalist=[{"image": str(one.path)} for one in inputs],
        handlers=[],
        **silent,
        # a setting of training alone is none of the inference configuration
        **{key: value for key, value in settings.items() if key in known},
    )
    try:
        workflow.initialize()
        return workflow.parser.get_parsed_content("evaluator")
    except Exception as error:
        raise first_of_ours(error) or PFedSAMError(
            "E16", f"inference of bundle '{bundle}' could not be started: {error}", "Check the settings."
        ) from error
