"""The app that MONAI Label runs: its tasks and strategies ask the process that holds the model."""

from __future__ import annotations

from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy

from .cases import Cases
from .line import Line, Refused

#: Set before MONAI Label makes the app.
line: Line | None = None


class SiteApp(MONAILabelApp):
    """One site, one model; no training, scoring or sessions.

    Raises:
        Refused: if it was not started by `pfedsam label-server`, which binds it to this machine and guards it.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        if line is None:
            raise Refused("Start this app with `pfedsam label-server`: it keeps the server on this machine.")
        self._line, self._about = line, line.ask("about")
        told = {key: self._about[key] for key in ("name", "description")}
        super().__init__(app_dir, studies, conf, labels=self._about["class_names"], **told)

    def init_datastore(self) -> Datastore:
        """The site folder."""
        return Cases(self._line)

    def init_infers(self) -> dict[str, InferTask]:
        """The model; where it takes boxes, a second time for Slicer's section SmartEdit."""
        name = self._about["model"]
        tasks = {name: Segment(self._line, self._about, InferType.SEGMENTATION)}
        if self._about["takes_boxes"]:
            tasks[f"box-{name}"] = Segment(self._line, self._about, InferType.DEEPEDIT)
        return tasks

    def init_strategies(self) -> dict[str, Strategy]:
        """What `Next Sample` may mean."""
        return {"without-label": InOrder("Cases without a label, by name"), "all": InOrder("All cases, by name")}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Segment an image of the site by its name; paths and the settings of a request count for nothing."""
        task = self._infers.get(request.get("model"))
        if task is None:
            raise Refused(f"There is no model '{request.get('model')}'. Fetch the models again.")
        file, params = task(request)
        return {"label": None, "tag": "original", "file": file, "params": params}

    def on_init_complete(self) -> None:
        """Nothing runs beside the requests."""

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """What Slicer shows after `Submit Label`."""
        return {"saved as": label_id}


class Segment(InferTask):
    """Asks for a segmentation, of a DeepEdit model with the box that Slicer's ROI is."""

    def __init__(self, desk: Line, about: dict[str, Any], kind: InferType) -> None:
        super().__init__(kind, about["class_names"], 3, about["description"])
        self._line, self._about, self._kind = desk, about, kind

    def is_valid(self) -> bool:
        """It is: the model is loaded."""
        return True

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The file of the label map, and what belongs to it."""
        box = None
        if self._kind == InferType.DEEPEDIT:
            if any(request.get(name) for name in (*self._about["class_names"], "foreground", "background")):
                raise Refused("This model takes a box, no points. Delete the points, place the ROI, press Update.")
            box = request.get("roi") or None
        found = self._line.ask("segment", image=request.get("image"), box=box)
        told = {"model": self._about["model"], "about": self._about["description"], "notes": found["notes"]}
        return found["file"], {"label_names": self._about["class_names"], **told}


class InOrder(Strategy):
    """Cases one after the other; after the last comes the first again."""

    _last = ""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """The next case, None if there is none."""
        names = datastore.list_images() if request.get("strategy") == "all" else datastore.get_unlabeled_images()
        if not names:
            return None
        self._last = next((name for name in names if name > self._last), names[0])
        return {"id": self._last}
