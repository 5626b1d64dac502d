"""What computes a network on a CPU: torch, or ONNX Runtime with a graph that is kept beside the model file.

The graph holds personal tensors, as the model file does: it lies in the same folder, under a hidden name, only its
owner may read it, and it is never sent. Each time it is opened its logits are compared with the network's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from monai.inferers import Inferer
from torch import Tensor

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import hash_of
from pfedsam.inference.export import difference_of_onnx, export_onnx, open_onnx, require_onnx

logger = logging.getLogger(__name__)

#: `auto` takes ONNX Runtime where it saves time, `onnx` from the first slice on.
Kind = Literal["auto", "torch", "onnx"]
#: From so many slices on, opening a graph that is there costs less than it saves; and making one, too
#: (`python tests/benchmarks/bench_speed.py --rows slice,graph`).
OPENING_PAYS, MAKING_PAYS = 40, 180


def checked_kind(kind: str) -> Kind:
    """The engine of this name.

    Raises:
        PFedSAMError: E16 if there is none, E31 if its library is not installed.
    """
    if kind not in get_args(Kind):
        known = ", ".join(get_args(Kind))
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"there is no engine '{kind}'.", f"Take one of {known}.")
    if kind == "onnx":
        require_onnx()
    return kind  # type: ignore[return-value]


def graph_file(model_file: Path, network: Any, settings: Mapping[str, Any]) -> Path:
    """Where the graph of a model is kept: `.<model>.<model file and libraries>-<network and settings>.onnx`.

    Args:
        model_file: the model.
        network: what it was loaded into.
        settings: all that decides what the network computes, beside the model file; plain JSON values.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime", "torch")]
    model = hashlib.sha256(model_file.read_bytes() + json.dumps(versions).encode()).hexdigest()
    how = hash_of([network.base_fingerprint, settings])
    return model_file.with_name(f"{_prefix(model_file)}{model[:16]}-{how[:16]}.onnx")


def _prefix(model_file: Path) -> str:
    return f".{model_file.name}."


class Engine:
    """A network in evaluation mode, `(B, 3, H, W)` to logits `(B, C, H, W)`, by the engine that serves best.

    Args:
        kind: `torch`, `onnx`, or `auto`: torch until so many slices were computed that a graph pays, then ONNX Runtime;
            torch alone on a GPU or without the extra `export`, and if there can be no graph, which the log says.
        network: with the model in it.
        model_file: the model; its graph is kept beside it, or in memory alone where nothing can be written.
        settings: see `graph_file`.

    Raises:
        PFedSAMError: E16, E31 for an engine that is not there, E32 for ONNX Runtime with a network on a GPU.
    """

    def __init__(self, kind: str, network: Any, model_file: Path, settings: Mapping[str, Any]) -> None:
        self.kind, self.network = checked_kind(kind), network
        self._model_file, self._settings = model_file, dict(settings)
        self._session: Any = None
        self._slices = 0
        device = next(network.parameters()).device.type
        if device != "cpu" and self.kind == "onnx":
            message = f"the engine 'onnx' works on the CPU, and the network is on '{device}'."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Take the device cpu, or the engine torch.")
        if self.kind == "auto" and (device != "cpu" or not _has_onnx()):
            self.kind = "torch"

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Raises:
            PFedSAMError: with `onnx`, E34 if the graph computes other numbers than the network.
        """
        self._slices += len(images)
        if self._session is None and self.kind != "torch":
            self._open()
        if self._session is None:
            return self.network(images)
        (logits,) = self._session.run(None, {"image": images.detach().numpy()})
        return torch.from_numpy(logits)

    def _open(self) -> None:
        """Open the graph if it pays, or make it."""
        if self.kind == "auto" and self._slices < OPENING_PAYS:
            return
        try:
            graph = graph_file(self._model_file, self.network, self._settings)
            self._session = self._opened(graph)
            if self._session is None and (self.kind == "onnx" or self._slices >= MAKING_PAYS):
                self._session = self._made(graph)
        # exporters fail in many ways, and each network that torch computes shall be computed
        except Exception as error:
            if self.kind == "onnx":
                raise
            logger.warning("the network is computed by torch: no ONNX graph of it could be made (%s)", error)
            self.kind = "torch"

    def _opened(self, graph: Path) -> Any:
        """A session of a graph that is there; None if there is none, or none that computes what the network does."""
        try:
            if not graph.is_file():
                return None
            session = open_onnx(graph)
            difference_of_onnx(session, self.network, batch=1)
        # onnxruntime has an exception for each thing that can be wrong in a file
        except Exception as error:
            logger.warning("%s is made anew: %s", graph, error)
            return None
        return session

    def _made(self, graph: Path) -> Any:
        """A session of a new graph, which is kept if it can be; graphs of an earlier model or library go."""
        logger.info("the network is exported for ONNX Runtime, once; the graph is kept beside the model file")
        try:
            export_onnx(self.network, graph)
        except OSError as error:
            logger.warning("the ONNX graph is not kept: %s", error)
            with tempfile.TemporaryDirectory() as scratch:
                export_onnx(self.network, Path(scratch) / "graph.onnx")
                return open_onnx(Path(scratch) / "graph.onnx")
        model = graph.name.rpartition("-")[0]
        for other in graph.parent.iterdir():
            stale = other.name.startswith(_prefix(self._model_file)) and not other.name.startswith(f"{model}-")
            if stale and other.suffix == graph.suffix:
                other.unlink(missing_ok=True)
        return open_onnx(graph)


def _has_onnx() -> bool:
    try:
        require_onnx()
    except PFedSAMError:
        return False
    return True


class EngineInferer(Inferer):
    """A bundle's own inferer that asks an engine in place of the network.

    Args:
        inferer: of the bundle.
        engine: of the network that the bundle hands over.
    """

    def __init__(self, inferer: Inferer, engine: Engine) -> None:
        super().__init__()
        self.inferer, self.engine = inferer, engine

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """What the bundle's inferer makes of `inputs`."""
        return self.inferer(inputs, self.engine, *args, **kwargs)
