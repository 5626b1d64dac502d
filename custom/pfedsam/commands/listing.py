"""The commands by name, and what `pfedsam --help` says of each. A command's module is imported when it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

#: Panels of `pfedsam --help`.
DATA, TRAIN, LOOK, OPERATE = "Data and weights", "Train", "Look", "Operate"


class Listed(NamedTuple):
    """What is known of a command before it is imported.

    Attributes:
        module: in this package; its `app` holds the command.
        panel: of the help.
        line: the first paragraph of its help, as the command itself has it.
    """

    module: str
    panel: str
    line: str


#: Every command of the first level, in the order of the help.
COMMANDS = {
    "phantom": Listed(
        "data", DATA, "Write a phantom federation: head volumes with lesions as NIfTI, each site with its own scanner."
    ),
    "validate": Listed(
        "data",
        DATA,
        "Check a site folder before it joins: pairs, values, labels, geometry, duplicates, splits. Changes nothing.",
    ),
    "split": Listed(
        "data",
        DATA,
        "Write which case is for training, validation or test: <site>/datalist.json, even also for few patients.",
    ),
    "prepare": Listed("data", DATA, "Lay out downloaded data as site folders. The source is not changed."),
    "new-bundle": Listed(
        "bundle",
        DATA,
        "Make a MONAI bundle for your own task: configuration only, ready to train, federate and infer.",
    ),
    "bundle-weights": Listed(
        "bundle",
        DATA,
        "Write a bundle's models/model.pt, the weights that MONAI's model zoo asks for. Nothing personal is in it.",
    ),
    "verify-bundle": Listed(
        "bundle", DATA, "Check a bundle offline as MONAI's model zoo does: one line a check; exit code 1 if one fails."
    ),
    "models": Listed("models", DATA, "Base weights: what there is, with sizes and licences, and where it is."),
    "simulate": Listed(
        "federation",
        TRAIN,
        "Simulate a federation of the site folders in DATA with NVFlare, and show what each site gained.",
    ),
    "demo": Listed(
        "federation",
        TRAIN,
        "The main job on a phantom federation of 4 sites: some minutes on a laptop, no data and no GPU needed.",
    ),
    "personalize": Listed(
        "inference",
        TRAIN,
        "A new hospital without a federation: fit a personal model beside a global one, and see what it gained.",
    ),
    "describe": Listed(
        "models",
        LOOK,
        "Show the effective network of BUNDLE under a job's strategy: settings, parameters, bytes on the wire, cost.",
    ),
    "settings": Listed("settings", LOOK, "List the settings of a bundle: meaning, unit, range, and who may set each."),
    "errors": Listed("errors", LOOK, "Say what an error code means and what helps."),
    "evaluate": Listed("evaluation", LOOK, "Dice of the global and the personal model of one site, with a picture."),
    "report": Listed(
        "evaluation",
        LOOK,
        "One self-contained page about a run: tables, curves, pictures, warnings. It names sites, never cases.",
    ),
    "compare": Listed(
        "compare",
        LOOK,
        "Compare strategies on the sites in DATA: train, test once at the end, tables with intervals and tests.",
    ),
    "watch": Listed(
        "watch",
        LOOK,
        "Follow a run of another terminal in a page: rounds, sites, Dice, time left. The run itself stays as it is.",
    ),
    "infer": Listed(
        "inference",
        LOOK,
        "Segment images with a site's model. The label lies exactly on its image: same shape, affine, orientation.",
    ),
    "view": Listed(
        "view",
        LOOK,
        "Look at images in a browser: truth, both models, differences, probabilities; correct and save masks.",
    ),
    "label-server": Listed(
        "label",
        LOOK,
        "Serve a site's model to 3D Slicer with MONAI Label: segment, with a box, correct, submit the label.",
    ),
    "export-model": Listed(
        "inference",
        LOOK,
        "Write one file for `infer`: both parts of a site's model, its settings, labels and metrics; no pickle.",
    ),
    "pull": Listed(
        "inference", LOOK, "Fetch the best global model of a finished job and pair it with this site's experts."
    ),
    "init-global": Listed(
        "models",
        OPERATE,
        "Write theta_0, the first global model, for a server without SAM weights (`pfedsam job export --theta0`).",
    ),
    "state": Listed("state", OPERATE, "The personal state of the sites on this machine."),
    "job": Listed("job", OPERATE, "NVFlare jobs."),
    "poc": Listed("poc", OPERATE, "A federation of real processes with mutual TLS on this machine."),
    "site": Listed("site", OPERATE, "A startup kit made ready for a hospital, and checked."),
    "certificates": Listed("certificates", OPERATE, "When a federation's certificates end, and their renewal."),
    "audit": Listed(
        "audit",
        OPERATE,
        "What left this site in a job: every result, its tensors and bytes, the filters, hashes of the configuration.",
    ),
}


class OnDemand(TyperGroup):
    """The group of all commands: it imports the one that is called, and none for the help or for a completion."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.commands = cast(Any, _Commands())

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page from `COMMANDS`."""
        TyperGroup.format_help(self._listed(), ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Names of commands that begin so, from `COMMANDS`."""
        return TyperGroup.shell_complete(self._listed(), ctx, incomplete)

    def _listed(self) -> OnDemand:
        listed = copy(self)
        listed.commands = {
            name: TyperCommand(name, help=one.line, rich_help_panel=one.panel) for name, one in COMMANDS.items()
        }
        return listed


class _Commands(Mapping[str, Any]):
    """The commands as typer makes them, each imported when it is first looked up."""

    def __getitem__(self, name: str) -> Any:
        return _loaded(COMMANDS[name].module)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@cache
def _loaded(module: str) -> dict[str, Any]:
    """All commands of a module, by name."""
    parent = typer.Typer()
    parent.add_typer(import_module(f"pfedsam.commands.{module}").app)
    return dict(get_group(parent).commands)
