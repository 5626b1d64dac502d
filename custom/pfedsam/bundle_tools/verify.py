"""What a model zoo's checks ask of a bundle, offline: one line for each check, for bundles that are not ours too."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedsam.bundle_tools.mirroring import mirrors, name_sides
from pfedsam.bundle_tools.tiny import tiny_site
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.settings import require_literals, require_together
from pfedsam.storage.bundle_weights import WEIGHTS

CONFIGS = ("train", "evaluate", "inference")
#: What a configuration's name may end with, as in MONAI's model zoo.
SUFFIXES = (".json", ".yaml", ".yml")
#: The zoo's checks ask for the license, the metadata and the weights, its unit tests for the logging configuration.
FILES = ("LICENSE", "docs/README.md", "configs/metadata.json", "configs/logging.conf", str(WEIGHTS))
#: What the zoo calls the network and, where a bundle has it, the network as TorchScript.
NETWORK, SCRIPTED = "network_def", Path("models", "model.ts")
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
        """Paths of configurations, whatever their suffix; of JSON where there is none."""
        return [str(self._config(name)) for name in names]

    def content(self, name: str) -> dict[str, Any]:
        """What a configuration says."""
        from monai.bundle import ConfigParser

        content: dict[str, Any] = ConfigParser.load_config_file(self._config(name))
        return content

    def _config(self, name: str) -> Path:
        paths = [self.root / "configs" / f"{name}{suffix}" for suffix in SUFFIXES]
        return next((path for path in paths if path.is_file()), paths[0])

    def known(self, *names: str) -> set[str]:
        """Top-level ids of configurations."""
        return {key for name in names for key in self.content(name)}

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
    paths = [bundle.root / name for name in FILES] + [Path(path) for path in bundle.config(*CONFIGS)]
    missing = [str(path.relative_to(bundle.root)) for path in paths if not path.is_file()]
    made = f"; `pfedsam bundle-weights {bundle.root}` makes {WEIGHTS}" if str(WEIGHTS) in missing else ""
    _require(not missing, f"missing: {missing}{made}")
    return f"{len(paths)} files"


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
    (path,), content = bundle.config("train"), bundle.content("train")
    checked = require_literals(content, path)
    require_together({name: content[name] for name in checked}, bundle.root.name)
    return f"{len(checked)} settings in their ranges"


def _sides(bundle: Bundle, scratch: Path) -> str:
    """Classes that mirror each other by their names are not mixed up by a mirrored training image."""
    content = bundle.content("train")
    pairs = name_sides(content.get("class_names", []))
    _require(not (pairs and mirrors(content)), f"{pairs} mirror each other, and training images are mirrored")
    return "no two classes mirror each other" if not pairs else f"{pairs}: training images are not mirrored"


def _network(bundle: Bundle, scratch: Path) -> str:
    from monai.bundle import verify_net_in_out

    (config,) = bundle.config("inference")
    verify_net_in_out(net_id=NETWORK, meta_file=bundle.meta_file, config_file=config, bundle_root=str(bundle.root))
    network, image, expected = _network_and_input(bundle)
    shape = tuple(network(image).shape[1:])
    _require(shape == expected, f"metadata say output {expected}, the network gives {shape}")
    return f"{tuple(image.shape[1:])} to {shape}"


def _train(bundle: Bundle, scratch: Path) -> str:
    return _properties(bundle, scratch, "train", "train")


def _evaluate(bundle: Bundle, scratch: Path) -> str:
    return _properties(bundle, scratch, "train", "train", "evaluate")


def _inference(bundle: Bundle, scratch: Path) -> str:
    return _properties(bundle, scratch, "inference", "inference")


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
    """MONAI's `ckpt_export` of the weights, as the zoo calls it, and the outputs beside the network's own."""
    import torch
    from monai.bundle import ckpt_export

    weights, path = bundle.root / WEIGHTS, scratch / "exported.ts"
    (config,) = bundle.config("inference")
    ckpt_export(
        net_id=NETWORK,
        filepath=str(path),
        ckpt_file=str(weights),
        meta_file=bundle.meta_file,
        config_file=config,
        bundle_root=str(bundle.root),
    )
    if (bundle.root / SCRIPTED).is_file():
        torch.jit.load(str(bundle.root / SCRIPTED))
    network, image, _ = _network_and_input(bundle)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    with torch.no_grad():
        difference = float((torch.jit.load(str(path), map_location="cpu")(image) - network(image)).abs().max())
    _require(difference <= TOLERANCE, f"TorchScript differs by {difference:.1e}")
    return f"TorchScript differs by {difference:.1e}"


def _runs(bundle: Bundle, scratch: Path) -> str:
    """Train one epoch on tiny data, evaluate it, infer with it."""
    data, out = _data(bundle, scratch), scratch / "out"
    # outputs of an earlier bundle in the same process must not be taken for this one's
    shutil.rmtree(out, ignore_errors=True)
    steps = {"train": ("train",), "evaluate": ("train", "evaluate"), "inference": ("inference",)}
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
    parser.read_config(bundle.config("inference"))
    parser["bundle_root"] = str(bundle.root)
    form = json.loads(Path(bundle.meta_file).read_text())["network_data_format"]
    given, wanted = form["inputs"]["image"], form["outputs"]["pred"]
    network = parser.get_parsed_content(NETWORK).eval()
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


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise ValueError(problem)
