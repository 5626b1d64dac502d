"""The site folder as MONAI Label's datastore: read by name, written by `Submit Label` alone, nothing deleted."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore

from .line import Line, Refused


class Cases(Datastore):
    """What the other process lists. A label goes there, too, and is never read back from here."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def name(self) -> str:
        """Not the site's: it is on the screen already."""
        return "site folder"

    def description(self) -> str:
        """Of the datastore."""
        return "NIfTI volumes of the site"

    def list_images(self) -> list[str]:
        """Names of all cases."""
        return [case["id"] for case in self._line.ask("cases")]

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Names of the cases that have a label."""
        return [case["id"] for case in self._line.ask("cases") if case["labelled"]]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Names of the others."""
        return [case["id"] for case in self._line.ask("cases") if not case["labelled"]]

    def get_image_uri(self, image_id: str) -> str:
        """The path of a case, "" if there is none."""
        return next((case["path"] for case in self._line.ask("cases") if case["id"] == image_id), "")

    def get_image(self, image_id: str, params: Any = None) -> Any:
        """The bytes of a case."""
        path = self.get_image_uri(image_id)
        return io.BytesIO(Path(path).read_bytes()) if path else None

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Name and path, by which Slicer on this machine opens it without a copy."""
        path = self.get_image_uri(image_id)
        return {"name": os.path.basename(path), "path": path} if path else {}

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Take a volume for as long as the server runs."""
        return self._line.ask("add", image=image_id, file=image_filename)["id"]

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Keep a label in the site folder; returns where, below it."""
        told = label_info.get("label_info")
        # Slicer numbers what it exports in the order of this list
        names = [one.get("name") for one in told] if isinstance(told, list) else None
        return self._line.ask("save", image=image_id, file=label_filename, segments=names)["saved"]

    def status(self) -> dict[str, Any]:
        """How many cases there are, and how many have a label."""
        cases = self._line.ask("cases")
        return {"total": len(cases), "completed": sum(case["labelled"] for case in cases), "label_tags": {}}

    def json(self) -> dict[str, Any]:
        """The names of the cases; labels are not offered."""
        return {"objects": {name: {"labels": {}} for name in self.list_images()}}

    def refresh(self) -> None:
        """Each question reads the folder anew."""

    def datalist(self) -> list[dict[str, Any]]:
        """Nothing: there is no training here."""
        return []

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """None is offered."""
        return {}

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """None is offered."""
        return ""

    def get_label(self, label_id: str, label_tag: str, params: Any = None) -> Any:
        """None is offered."""
        return None

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """None is offered."""
        return ""

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """None is offered."""
        return {}

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Nothing is kept of who looked at what."""

    def set_name(self, name: str) -> None:
        """Refused."""
        raise Refused("The site folder keeps its name.")

    set_description = set_name

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Refused."""
        raise Refused("The site folder is not handed out as a whole.")

    def remove_image(self, image_id: str) -> None:
        """Refused."""
        raise Refused("Nothing is deleted here.")

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Refused."""
        raise Refused("Nothing is deleted here.")

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Refused."""
        raise Refused("Nothing is kept of labels here.")
