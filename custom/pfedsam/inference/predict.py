"""Images through a bundle's own inference workflow, one at a time."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import DataLoader, Dataset
from numpy.typing import NDArray

from pfedsam.bundles import LOAD_MODEL, LOAD_MODEL_BEFORE, class_values, find_bundle, is_rgb, local_settings
from pfedsam.data import transforms
from pfedsam.data.field_of_view import share_outside
from pfedsam.data.intensity import NO_WINDOW, window_is_empty
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.errors import ErrorCode, PFedSAMError, failing_as, first_of_ours
from pfedsam.inference.engines import Engine, EngineInferer, checked_kind
from pfedsam.inferers import PromptedSliceInferer
from pfedsam.networks.prompts import boxes_of
from pfedsam.storage.site_model import model_settings

#: Foreground of the mask that a box becomes.
_INSIDE = 255
_BOX = "Give x0,x1,y0,y1, and z0,z1 for a volume."


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: as it was read.
        probabilities: `(C, x, y[, z])` in the grid of the image.
        field_of_view: side in millimetres of the square that the bundle sees, None if it sees all of an image.
        class_values: the numbers that belong to each class, see `pfedsam.data.transforms.class_map`.
    """

    image: Picture
    probabilities: NDArray[np.float32]
    field_of_view: float | None = None
    class_values: Sequence[Sequence[int]] | None = None

    def label(self, threshold: float = 0.5) -> NDArray[np.uint8]:
        """Values `(x, y[, z])`: 0, or a class above the threshold: of nested ones the inner, else the most probable."""
        return transforms.class_map(torch.from_numpy(self.probabilities), threshold, self.class_values).numpy()

    @property
    def share_unseen(self) -> float:
        """The share of the image, 0 to 1, outside the field of view: nothing can be found there."""
        return 0.0 if self.field_of_view is None else share_outside(self.image, self.field_of_view)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of how the image was read, in sentences."""
        empty = self.field_of_view is not None and window_is_empty(self.image.grey())
        return (*self.image.notes, *((NO_WINDOW,) if empty else ()))


class Predictor:
    """A site's model in its bundle's inference workflow. Call it with one image after the other.

    Memory holds one volume at a time. An image that goes wrong raises, and the next can be tried.

    Args:
        model_file: of a site: its state, an exported model, or what a bundle's training wrote.
        bundle: name of an installed bundle; by default what the model names.
        overrides: of the bundle, as in training; by default what the model was trained with.
        checkpoint: see `pfedsam.bundles.local_settings`.
        experts: the personal model, or with False the global one.
        device: a torch device, as `cpu` or `cuda:1`; by default the bundle's choice, the first GPU if there is one.
        engine: what computes the network on a CPU, see `pfedsam.inference.engines.Engine`. An image with a box is
            computed by torch.

    Raises:
        PFedSAMError: from the first call or `open`: E10 to E13 for a model that does not fit, E16 for a device or an
            engine that is not there, E31 if the engine is not installed, E32 for an engine that does not go with the
            device, E16 or E18 for wrong settings.
    """

    def __init__(
        self,
        model_file: str | Path,
        *,
        bundle: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        checkpoint: str | None = None,
        experts: bool = True,
        device: str | None = None,
        engine: str = "auto",
    ) -> None:
        self.model_file, self.experts, self.checkpoint, self.device = model_file, experts, checkpoint, device
        self.engine = engine
        self._told = bundle, overrides or {}
        self._evaluator: Any = None
        self.class_values: Sequence[Sequence[int]] | None = None

    def open(self) -> None:
        """Build the workflow and load the model, once."""
        if self._evaluator is not None:
            return
        checked_kind(self.engine)
        self.bundle, self.settings = model_settings(self.model_file, *self._told)
        settings = local_settings(self.settings, self.checkpoint)
        if self.device is not None:
            settings["device"] = _usable(self.device)
        workflow = _workflow(self.bundle, self.model_file, settings, self.experts)
        message = f"inference of bundle '{self.bundle}' could not be started"
        with failing_as(ErrorCode.BUNDLE_FAILED, message, "Check the settings."):
            workflow.initialize()
            parser = workflow.parser
            self.field_of_view = parser.get_parsed_content("field_of_view_mm") if "field_of_view_mm" in parser else None
            self._evaluator = parser.get_parsed_content("evaluator")
            self.class_values = class_values(self.bundle, self.settings)
        # the bundle may place one transform or none at all on its dataset
        self._transform = self._evaluator.data_loader.dataset.transform
        self._inferer = self._evaluator.inferer
        self._roi_size = tuple(self._inferer.roi_size)  # MONAI's slice inferer changes its own when it is called
        told = {"bundle": self.bundle, "settings": self.settings, "experts": self.experts}
        engine = Engine(self.engine, self._evaluator.network, Path(self.model_file), told)
        self._by_engine = EngineInferer(self._inferer, engine)

    def __call__(self, image: str | Path | Picture, box: Sequence[int] | None = None) -> Prediction:
        """Segment one image.

        Args:
            image: a path, see `pfedsam.data.reader.load_picture`, or an image that was read.
            box: first and last voxel along each axis of the image, `(x0, x1, y0, y1[, z0, z1])`: what is to be
                segmented lies inside. For models that were trained with boxes.

        Raises:
            PFedSAMError: E02, E05 or E09 for the image, E16 for a box that is not inside, E32 for a model without
                boxes.
        """
        self.open()
        if box is not None and not self.settings.get("box_probability"):
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                "a box is for a model that was trained with boxes.",
                "Train it with box_probability=0.5, or leave the box out.",
            )
        picture = image if isinstance(image, Picture) else load_picture(Path(image))
        self._require_kind(picture)
        try:
            probabilities = self._probabilities(picture, box)
        except Exception as error:
            raise first_of_ours(error) or PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE,
                f"{picture.source} went wrong: {type(error).__name__}: {error}.",
                "Look at it first.",
            ) from error
        return Prediction(picture, probabilities, self.field_of_view, self.class_values)

    def _require_kind(self, image: Picture) -> None:
        """Refuse a volume where the bundle takes pictures; a picture is a volume of one slice to the others."""
        if image.kind != "picture" and is_rgb(find_bundle(self.bundle)):
            raise PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE,
                f"{image.source} is a volume, and bundle '{self.bundle}' takes pictures (PNG, JPG, TIFF, BMP).",
                "Take a model of a bundle for volumes, or give pictures.",
            )

    def _probabilities(self, image: Picture, box: Sequence[int] | None) -> NDArray[np.float32]:
        outputs: list[Any] = []
        evaluator = self._evaluator
        evaluator.data_loader = DataLoader(Dataset([{"image": image}], self._transform), batch_size=1)
        evaluator.inferer = self._by_engine if box is None else self._prompted(image, box)
        # what the transforms would warn of is among the remarks; an error is raised, and told in one sentence
        with (
            _without_warnings(evaluator.logger),
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output)),
        ):
            evaluator.run()
        return np.asarray(outputs[0]["pred"].detach().cpu(), dtype=np.float32)

    def _prompted(self, image: Picture, box: Sequence[int]) -> PromptedSliceInferer:
        """The bundle's slice inferer with the box as a prompt: it goes the way of the image, as a mask of its own."""
        pairs = list(zip(box[::2], box[1::2], strict=True))
        sizes = image.shape[: len(pairs)]
        if len(sizes) != len(pairs):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"the box has {len(box)} numbers, {image.source} has {len(sizes)} axes.", _BOX
            )
        if not all(0 <= first <= last < size for (first, last), size in zip(pairs, sizes, strict=True)):
            raise PFedSAMError(ErrorCode.WRONG_SETTING, f"the box {list(box)} is not inside {list(sizes)}.", _BOX)
        inside = np.zeros(image.shape, dtype=np.uint8)
        inside[tuple(slice(first, last + 1) for first, last in pairs)] = _INSIDE
        with _without_warnings():
            volume = self._transform({"image": replace(image, values=inside, white=float(_INSIDE))})["image"]
        # the middle channel is the slice itself
        masks = volume[1] > 0.5 * max(float(volume[1].max()), 1e-6)
        return PromptedSliceInferer(
            boxes_of(masks.permute(2, 0, 1)[:, None]),
            roi_size=self._roi_size,
            sw_batch_size=self._inferer.sw_batch_size,
            spatial_dim=self._inferer.spatial_dim,
        )


@contextmanager
def _without_warnings(*others: logging.Logger) -> Iterator[None]:
    """Without what the bundle's transforms warn of: said otherwise, or of a mask that has no intensity window.

    Args:
        others: loggers that are silent, too.
    """
    silenced = [transforms.logger, *others]
    before = [logger.disabled for logger in silenced]
    try:
        for logger in silenced:
            logger.disabled = True
        yield
    finally:
        for logger, was in zip(silenced, before, strict=True):
            logger.disabled = was


def _usable(name: str) -> torch.device:
    """A torch device that there is (else E16)."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch without CUDA says so by an AssertionError
    except (RuntimeError, AssertionError) as error:
        message = f"the device '{name}' cannot be used: {str(error).splitlines()[0]}"
        raise PFedSAMError(ErrorCode.WRONG_SETTING, message, "Take cpu, or a GPU that torch sees.") from None
    return device


def _workflow(bundle: str, model_file: str | Path, settings: Mapping[str, Any], experts: bool) -> ConfigWorkflow:
    """The bundle's inference, which gives probabilities and writes nothing."""
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
    if parser.get("initialize") == list(LOAD_MODEL_BEFORE):
        # a bundle of a user's own, made before there was the line
        silent["initialize"] = [LOAD_MODEL]
    known = set(parser.get())
    nowhere = tempfile.gettempdir()
    return ConfigWorkflow(
        config_file=str(config),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(root),
        dataset_dir=nowhere,
        output_dir=nowhere,
        model_file=str(model_file),
        experts_on=experts,
        # images are handed over one by one
        datalist=[{"image": ""}],
        handlers=[],
        **silent,
        # a setting of training alone is none of the inference configuration
        **{key: value for key, value in settings.items() if key in known},
    )
