"""What a model zoo's checks ask of a bundle, offline: one line for each check, for bundles that are not ours too."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfedsam.bundle_tools.mirroring import mirrors, name_sides
from pfedsam.data.splitting import write_datalist
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.settings import require_literals, require_together

CONFIGS = ("train.json", "evaluate.json", "inference.json")
FILES = ("LICENSE", "docs/README.md", "configs/metadata.json", *(f"configs/{name}" for name in CONFIGS))
#: Largest difference of outputs between the network and its export.
TOLERANCE = 1e-4
#: Settings of a run on tiny data, where a bundle has them.
TINY: dict[str, Any] = {
    "backbone": "vit_test",
    "image_size": 64,
    "max_epochs": 1,
    "val_interval": 1,
    "batch_size": 2,
    "augmentations": 1,
}
_TINY_CASES = 6


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and what was found."""

    name: str
    passed: bool
    message: str


@dataclass
class Bundle:
    """A bundle's folder while it is checked.

    Args:
        root: its folder, absolute.
        schema: file of the metadata schema.
        data: site folder for the tiny runs; by default one is made, in the form that the metadata say.
    """

    root: Path
    schema: Path
    data: Path | None = None

    def __post_init__(self) -> None:
        self.root = self.root.resolve()

    @property
    def meta_file(self) -> str:
        """Path of the metadata."""
        return str(self.root / "configs" / "metadata.json")

    def config(self, *names: str) -> list[str]:
        """Paths of configurations."""
        return [str(self.root / "configs" / name) for name in names]

    def known(self, *names: str) -> set[str]:
        """Top-level ids of configurations."""
        return {key for path in self.config(*names) for key in json.loads(Path(path).read_text())}

    def workflow(self, kind: str, *names: str, **settings: Any) -> Any:
        """A workflow of the bundle, not started."""
        from monai.bundle import ConfigWorkflow

        return ConfigWorkflow(
            config_file=self.config(*names),
            meta_file=self.meta_file,
            logging_file=False,
            workflow_type=kind,
            bundle_root=str(self.root),
            **settings,
        )


def verify_bundle(bundle: Bundle) -> Iterator[Check]:
    """Run the checks one after the other; a failure does not stop the others.

    Raises:
        PFedSAMError: E02 if the bundle's folder or the schema is not there.
    """
    for path, what in ((bundle.root, "bundle"), (bundle.schema, "schema file")):
        if not path.exists():
            raise PFedSAMError(ErrorCode.SITE_FOLDER, f"there is no {what} {path}.", "Give its path.")
    with tempfile.TemporaryDirectory(prefix="pfedsam-verify-") as scratch:
        for name, check in CHECKS.items():
            try:
                yield Check(name, True, check(bundle, Path(scratch)))
            # a check of somebody's configuration may raise anything
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                yield Check(name, False, f"{type(error).__name__}: {lines[0]}" + (f" {lines[-1]}" if lines[1:] else ""))


def _files(bundle: Bundle, scratch: Path) -> str:
    missing = [name for name in FILES if not (bundle.root / name).is_file()]
    _require(not missing, f"missing: {missing}")
    return f"{len(FILES)} files"


def _metadata(bundle: Bundle, scratch: Path) -> str:
    from monai.bundle import verify_metadata

    # what is at this place is not downloaded
    verify_metadata(meta_file=bundle.meta_file, filepath=shutil.copy(bundle.schema, scratch / "schema.json"))
    metadata = json.loads(Path(bundle.meta_file).read_text())
    _require(metadata["version"] in metadata["changelog"], f"version {metadata['version']} is not in the changelog")
    first = next(iter(metadata["changelog"]))
    _require(first == metadata["version"], f"the changelog starts with {first}, not with {metadata['version']}")
    return f"version {metadata['version']}"


def _settings(bundle: Bundle, scratch: Path) -> str:
    (path,) = bundle.config("train.json")
    content = json.loads(Path(path).read_text())
    checked = require_literals(content, path)
    require_together({name: content[name] for name in checked}, bundle.root.name)
    return f"{len(checked)} settings in their ranges"


def _sides(bundle: Bundle, scratch: Path) -> str:
    """Classes that mirror each other by their names are not mixed up by a mirrored training image."""
    content = json.loads(Path(*bundle.config("train.json")).read_text())
    pairs = name_sides(content.get("class_names", []))
    _require(not (pairs and mirrors(content)), f"{pairs} mirror each other, and training images are mirrored")
    return "no two classes mirror each other" if not pairs else f"{pairs}: training images are not mirrored"


def _network(bundle: Bundle, scratch: Path) -> str:
    network, image, expected = _network_and_input(bundle)
    shape = tuple(network(image).shape[1:])
    _require(shape == expected, f"metadata say output {expected}, the network gives {shape}")
    return f"{tuple(image.shape[1:])} to {shape}"


def _train(bundle: Bundle, scratch: Path) -> str:
    return _properties(bundle, scratch, "train", "train.json")


def _evaluate(bundle: Bundle, scratch: Path) -> str:
    return _properties(bundle, scratch, "train", "train.json", "evaluate.json")


def _inference(bundle: Bundle, scratch: Path) -> str:
    return _properties(bundle, scratch, "inference", "inference.json")


def _properties(bundle: Bundle, scratch: Path, kind: str, *names: str) -> str:
    settings = {key: value for key, value in TINY.items() if key in bundle.known(*names)}
    data, out = str(_data(bundle, scratch)), str(scratch / "properties")
    # nothing is loaded: there is no trained model yet
    workflow = bundle.workflow(kind, *names, dataset_dir=data, output_dir=out, initialize=["$None"], **settings)
    workflow.initialize()
    missing = workflow.check_properties()
    _require(not missing, f"missing or wrong: {missing}")
    return f"{len(workflow.properties)} properties"


def _export(bundle: Bundle, scratch: Path) -> str:
    import torch

    network, image, _ = _network_and_input(bundle)
    path = scratch / "exported.ts"
    with warnings.catch_warnings():
        # constants of the image size: the export is for one size
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(network, image, check_trace=False).save(str(path))
    difference = float((torch.jit.load(str(path))(image) - network(image)).abs().max())
    _require(difference <= TOLERANCE, f"TorchScript differs by {difference:.1e}")
    return f"TorchScript differs by {difference:.1e}"


def _runs(bundle: Bundle, scratch: Path) -> str:
    """Train one epoch on tiny data, evaluate it, infer with it."""
    data, out = _data(bundle, scratch), scratch / "out"
    # outputs of an earlier bundle in the same process must not be taken for this one's
    shutil.rmtree(out, ignore_errors=True)
    steps = {"train": ("train.json",), "evaluate": ("train.json", "evaluate.json"), "inference": ("inference.json",)}
    for step, names in steps.items():
        known = bundle.known(*names)
        settings = {key: value for key, value in TINY.items() if key in known}
        kind = "inference" if step == "inference" else "train"
        target = out / step if step == "inference" else out
        if step != "train" and "model_file" in known:
            settings["model_file"] = str(out / "model.safetensors")
        workflow = bundle.workflow(kind, *names, dataset_dir=str(data), output_dir=str(target), **settings)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        _require(any(path.is_file() for path in target.rglob("*")), f"{step} wrote nothing")
    images, written = len(list((data / "images").iterdir())), sum(p.is_file() for p in (out / "inference").rglob("*"))
    _require(written == images, f"inference wrote {written} files for {images} images")
    return f"trained, evaluated, {written} labels written"


#: In their order, by the name that is printed.
CHECKS: dict[str, Callable[[Bundle, Path], str]] = {
    "files": _files,
    "metadata": _metadata,
    "settings": _settings,
    "left and right": _sides,
    "network in and out": _network,
    "properties of train": _train,
    "properties of train and evaluate": _evaluate,
    "properties of inference": _inference,
    "export": _export,
    "runs on tiny data": _runs,
}


def _network_and_input(bundle: Bundle) -> tuple[Any, Any, tuple[int, ...]]:
    """The bundle's network in evaluation mode, a batch of its input, the shape of one output by the metadata."""
    import torch
    from monai.bundle import ConfigParser

    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config(bundle.config("inference.json"))
    parser["bundle_root"] = str(bundle.root)
    form = json.loads(Path(bundle.meta_file).read_text())["network_data_format"]
    given, wanted = form["inputs"]["image"], form["outputs"]["pred"]
    network = parser.get_parsed_content("network_def").eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    image = torch.rand(2, given["num_channels"], *given["spatial_shape"])
    return network, image, (wanted["num_channels"], *wanted["spatial_shape"])


def _data(bundle: Bundle, scratch: Path) -> Path:
    if bundle.data is None:
        form = json.loads(Path(bundle.meta_file).read_text())["network_data_format"]
        rgb = form["inputs"]["image"]["format"] == "RGB"
        bundle.data = tiny_site(scratch / "site", form["outputs"]["pred"]["num_channels"], rgb)
    return bundle.data


def tiny_site(out: Path, classes: int, rgb: bool, cases: int = _TINY_CASES, seed: int = 0) -> Path:
    """Write a site folder of tiny images, and its split: bright balls inside each other, class n the n-th from outside.

    Args:
        out: the site folder.
        classes: number of label values beside 0.
        rgb: colour pictures (PNG); else volumes (NIfTI).
        cases: number of images, at least 3.
        seed: same seed, same images.
    """
    import nibabel
    from PIL import Image

    random = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    shape = (48, 40) if rgb else (48, 40, 6)
    for case in range(cases):
        centre = [size * random.uniform(0.4, 0.6) for size in shape]
        grids = np.meshgrid(
            *[(np.arange(n) - c) / (0.35 * n) for n, c in zip(shape, centre, strict=True)], indexing="ij"
        )
        distance = np.sqrt(sum(grid**2 for grid in grids))
        label = sum((distance < 1 - n / (classes + 1)).astype(np.uint8) for n in range(classes))
        values = 40 + 60 * label + random.normal(0, 6, shape)
        name = f"tiny{case}"
        if rgb:
            colour = np.stack([values, 0.7 * values, 0.4 * values], axis=-1).clip(0, 255).astype(np.uint8)
            Image.fromarray(np.swapaxes(colour, 0, 1)).save(out / "images" / f"{name}.png")
            Image.fromarray(np.swapaxes(label, 0, 1)).save(out / "labels" / f"{name}.png")
        else:
            affine = np.diag([4.0, 4.0, 5.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), out / "images" / f"{name}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(label, affine), out / "labels" / f"{name}.nii.gz")
    write_datalist(out)
    return out


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise ValueError(problem)
