"""A site's model for use: one file without moments, and the personal network as TorchScript or ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pfedsam.bundles import class_names, find_bundle, network_of, settings_of
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import when_whole
from pfedsam.networks.lora import merged
from pfedsam.storage.site_model import model_settings, read, write

#: Largest difference of logits between eager, TorchScript and ONNX.
TOLERANCE = 1e-4
#: The first set of ONNX operators with GELU; the newest that torch's exporter by tracing writes.
OPSET = 20
#: What TorchScript says of the places in our source files, and the records that its writer makes itself.
_SOURCES, _OF_THE_WRITER = ".debug_pkl", ("version", ".data/serialization_id")

#: Told what is done next.
Event = Callable[[str], None]


def _nobody(text: str) -> None:
    """For callers that need not be told."""


def export_all(
    source: Path,
    out: Path,
    bundle: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    torchscript: Path | None = None,
    onnx: Path | None = None,
    experts: bool = True,
    event: Event = _nobody,
) -> list[str]:
    """Write a model and, where asked for, its network as TorchScript and ONNX: all of these files, or none.

    Args:
        source, out, bundle, overrides: see `export_model`.
        torchscript, onnx: files to write.
        experts: the personal network, or with False the global one.
        event: called before each step: one for the model, three for each network.

    Returns:
        A line about each file.

    Raises:
        PFedSAMError: as `export_model`, `export_torchscript` and `export_onnx`.
    """
    if onnx is not None:
        require_onnx()
    lines = []
    with ExitStack() as stack:
        event(out.name)
        info = export_model(source, stack.enter_context(when_whole(out)), bundle, overrides)
        lines.append(f"{out}: bundle {info['bundle']}, round {info.get('round')}, labels {info['labels']}")
        for path, write_network in ((torchscript, export_torchscript), (onnx, export_onnx)):
            if path is None:
                continue
            event(f"{path.name}: the network")
            network = personal_network(source, bundle, overrides, experts)
            difference = write_network(network, stack.enter_context(when_whole(path)), event)
            lines.append(f"{path}: differs from the network by at most {difference:.1e}")
    return lines


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


def export_torchscript(network: Any, out: str | Path, event: Event = _nobody) -> float:
    """Trace the network for any batch size and write it.

    Returns:
        The largest difference of its logits from the network's, on a batch of another size than it was traced with.

    Raises:
        PFedSAMError: E34 if it exceeds `TOLERANCE`; a file that was there before is intact then.
    """
    first, other = _images(network, 2), _images(network, 3)
    event(f"{Path(out).name}: tracing")
    with _kept_if_right(out) as path, torch.no_grad(), warnings.catch_warnings():
        # constants of a fixed image size: that is what is wanted
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated.*")
        traced = path.with_name("traced")
        torch.jit.trace(network, first, check_trace=False).save(str(traced))
        _without_sources(traced, path)
        event(f"{path.name}: comparing with the network")
        logits = torch.jit.load(str(path), map_location="cpu")(other)
        return _difference("TorchScript", logits, network(other))


def export_onnx(network: Any, out: str | Path, event: Event = _nobody) -> float:
    """Write the network as ONNX for any batch size, and run it with onnxruntime.

    Returns:
        The largest difference of its logits from the network's, on a batch of another size than it was exported with.

    Raises:
        PFedSAMError: E34 if it exceeds `TOLERANCE`, E31 if onnx and onnxruntime are not installed; a file that was
            there before is intact then.
    """
    require_onnx()
    event(f"{Path(out).name}: tracing")
    with _kept_if_right(out) as path:
        _write_onnx(merged(network), _images(network, 2), path)
        _without_stack_traces(path)
        event(f"{path.name}: comparing with the network")
        return difference_of_onnx(open_onnx(path), network)


def require_onnx() -> None:
    """Refuse to go on without the libraries of the extra `export` (E31)."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise PFedSAMError(
            ErrorCode.MISSING_LIBRARY, f"ONNX needs {error.name}.", "Install the extra 'export' of pfedsam."
        ) from None


def open_onnx(path: Path) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def difference_of_onnx(session: Any, network: Any, batch: int = 3) -> float:
    """The largest difference of a session's logits from the network's, on some images; the graph was made with two.

    Raises:
        PFedSAMError: E34 if it exceeds `TOLERANCE`.
    """
    images = _images(network, batch)
    (logits,) = session.run(None, {"image": images.numpy()})
    with torch.no_grad():
        return _difference("ONNX", torch.from_numpy(logits), network(images))


def _write_onnx(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    """By tracing, which takes seconds; the exporter that captures symbolic shapes takes minutes for `lite_medsam`."""
    with warnings.catch_warnings():
        # constants of a fixed image size: that is what is wanted
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export.*")
        warnings.filterwarnings("ignore", message=".*Constant folding.*")
        torch.onnx.export(
            network,
            (images,),
            str(path),
            input_names=["image"],
            output_names=["pred"],
            dynamic_axes={"image": {0: "batch"}, "pred": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


@contextmanager
def _kept_if_right(out: str | Path) -> Iterator[Path]:
    """A file beside `out` that takes its place if nothing was raised, and is removed if something was."""
    with when_whole(out) as path:
        yield path
        path.chmod(0o600)  # it holds personal tensors


def _without_sources(traced: Path, path: Path) -> None:
    """Copy a TorchScript file without what names source files of this machine: only error messages need it."""
    reader, writer = torch._C.PyTorchFileReader(str(traced)), torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        if not name.endswith((_SOURCES, *_OF_THE_WRITER)):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()


def _without_stack_traces(path: Path) -> None:
    """Write an ONNX file anew without what the exporter notes of each step: the lines of source that it came from."""
    import onnx

    model = onnx.load(str(path))
    _forget_notes(model)
    onnx.save(model, str(path))


def _forget_notes(message: Any) -> None:
    """Clear metadata and texts for people in a part of an ONNX model, and in all that it holds."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _forget_notes(part)


def _images(network: Any, batch: int) -> torch.Tensor:
    """Images of noise, the same each time."""
    random = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, network.image_size, network.image_size, generator=random)


def _difference(kind: str, logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; E34 if it is more than `TOLERANCE`, or no number."""
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE:
        raise PFedSAMError(
            ErrorCode.EXPORT_DIFFERS,
            f"{kind} differs from the network by {difference:.2e}, more than {TOLERANCE:.0e}.",
            "It is not kept: use the model file itself.",
        )
    return difference
