"""A site's model for use: one file without moments, and the personal network as TorchScript or ONNX."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pfedsam.bundles import class_names, find_bundle, network_of, settings_of
from pfedsam.errors import PFedSAMError
from pfedsam.site_model import model_settings, read, write

#: Largest difference of logits between eager, TorchScript and ONNX.
TOLERANCE = 1e-4


def export_model(
    source: str | Path, out: str | Path, bundle: str | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the pair of shared and personal tensors with all that `infer` needs to know, and no moments.

    Args:
        source: state or model of a site.
        out: file to write (safetensors with JSON metadata). It holds personal tensors: it stays at the site.
        bundle: name of an installed bundle; by default what the model names.
        overrides: of the bundle, as in training; by default what the model was trained with.

    Returns:
        What the file tells of itself.

    Raises:
        PFedSAMError: E10 to E13 if the model does not fit the bundle's network, E16 or E18 for wrong settings.
    """
    name, settings = model_settings(source, bundle, overrides or {})
    model = read(source)
    model.load_into(network_of(name, settings))  # what cannot be loaded is not written
    model.moments = {}
    model.info |= {
        "bundle": name,
        "overrides": settings,
        # without the path of the base weights on this machine: their fingerprint says which they are
        "settings": {key: value for key, value in settings_of(name, settings).items() if key != "checkpoint"},
        "labels": class_names(find_bundle(name)),
        "use": "Research only. Not for diagnostic use.",
    }
    write(out, model)
    return model.info


def personal_network(
    source: str | Path,
    bundle: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    experts: bool = True,
) -> nn.Module:
    """The network of a model, in evaluation mode: `(B, 3, H, W)` in [0, 1] to logits `(B, C, H, W)`."""
    name, settings = model_settings(source, bundle, overrides or {})
    network, model = network_of(name, settings), read(source)
    model.load_into(network)
    model.use(network, experts)
    return network.eval()


def export_torchscript(network: Any, out: str | Path) -> float:
    """Trace the network for any batch size and write it.

    Returns:
        The largest difference of its logits from the network's, on a batch of another size than it was traced with.

    Raises:
        PFedSAMError: E16 if it exceeds `TOLERANCE`; a file that was there before is intact then.
    """
    first, other = _examples(network)
    with _kept_if_right(out) as path, torch.no_grad(), warnings.catch_warnings():
        # constants of a fixed image size: that is what is wanted
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(network, first, check_trace=False).save(str(path))
        found = torch.jit.load(str(path), map_location="cpu")(other)
        return _difference("TorchScript", found, network(other))


def export_onnx(network: Any, out: str | Path) -> float:
    """Write the network as ONNX for any batch size, and run it with onnxruntime.

    Returns:
        The largest difference of its logits from the network's, on a batch of another size than it was exported with.

    Raises:
        PFedSAMError: E16 if it exceeds `TOLERANCE`, or if onnx and onnxruntime are not installed; a file that was there
            before is intact then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PFedSAMError("E16", f"ONNX needs {error.name}.", "Install the extra 'export' of pfedsam.") from None
    first, other = _examples(network)
    batch = torch.export.Dim("batch", min=1, max=64)
    with _kept_if_right(out) as path:
        torch.onnx.export(
            network,
            (first,),
            str(path),
            input_names=["image"],
            output_names=["pred"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"image": other.numpy()})
        with torch.no_grad():
            return _difference("ONNX", torch.from_numpy(found), network(other))


@contextmanager
def _kept_if_right(out: str | Path) -> Iterator[Path]:
    """A file beside `out` that takes its place if nothing was raised, and is removed if something was."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        path = Path(folder) / out.name
        yield path
        path.chmod(0o600)  # it holds personal tensors
        os.replace(path, out)


def _examples(network: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Batches of 2 and of 3 images."""
    random = torch.Generator().manual_seed(0)
    side = network.image_size
    return torch.rand(2, 3, side, side, generator=random), torch.rand(3, 3, side, side, generator=random)


def _difference(kind: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; E16 if it is more than `TOLERANCE`, or no number."""
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:
        raise PFedSAMError(
            "E16",
            f"{kind} differs from the network by {difference:.2e}, more than {TOLERANCE:.0e}.",
            "It is not kept: use the model file itself.",
        )
    return difference
