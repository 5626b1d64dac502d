"""`pfedsam infer`, `export-model` and `personalize`: the trained model in use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam.commands.console import LOOK, TRAIN, Admin, ModelBundle, Overrides, bar, console, literals, quiet_libraries
from pfedsam.commands.evaluation import show_evaluation
from pfedsam.errors import PFedSAMError

app = typer.Typer()

Model = Annotated[Path, typer.Option("--model", help="state.safetensors or exported model of a site.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(envvar="PFEDSAM_CHECKPOINT", help="Path of the base weights; by default the bundle's."),
]


@app.command(rich_help_panel=LOOK)
def infer(
    images: Annotated[list[Path], typer.Argument(help="NIfTI, PNG or JPG files, or folders of one DICOM series each.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/infer"),
    bundle: ModelBundle = None,
    global_: Annotated[bool, typer.Option("--global", help="The global model: experts off.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write probabilities too.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Write a picture of the largest slice too.")] = False,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="For a DICOM series a segmentation object too.")
    ] = False,
    box: Annotated[
        str | None, typer.Option(help="x0,x1,y0,y1[,z0,z1]: voxels of the one image; for models trained with boxes.")
    ] = None,
    checkpoint: Checkpoint = None,
    set_: Overrides = None,
) -> None:
    """Segment images with a site's model. The label lies exactly on its image: same shape, affine, orientation.

    Value 0 is background, 1 the bundle's first class and so on. Research only, not for diagnostic use.
    """
    quiet_libraries()
    with console.status("loading the model"):
        from pfedsam.bundles import class_names, find_bundle
        from pfedsam.inference.formats import write_label, write_probabilities, write_segmentation
        from pfedsam.inference.predict import predict
        from pfedsam.site_model import model_settings

        overrides = literals(set_ or [])
        name, _ = model_settings(model, bundle, overrides)
    labels = class_names(find_bundle(name))
    written: list[tuple[Path, int]] = []
    with bar("segmenting", len(images)) as advance:

        def keep(found: Any) -> None:
            label = found.label()
            stem = out / f"{found.image.name}_{'_'.join(labels)}"
            written.append((write_label(label, found.image, stem), int((label > 0).sum())))
            if probabilities:
                probability_file = stem.with_name(stem.name + "_probability")
                write_probabilities(found.probabilities, found.image, probability_file)
            if dicom_seg and found.image.slices:
                write_segmentation(label, found.image, stem, labels, f"pFedSAM {name}")
            if overlay:
                from pfedsam.inference.overlay import write_overlay

                write_overlay(found, stem.with_name(stem.name + "_overlay.png"))
            advance(len(written), found.image.name)

        how: dict[str, Any] = {"bundle": bundle, "overrides": overrides, "checkpoint": checkpoint}
        predict(model, images, keep, experts=not global_, box=_box(box), **how)
    for path, voxels in written:
        console.print(f"{path}: {voxels:,} voxels" if voxels else f"{path}: nothing found", highlight=False)


def _box(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) not in (4, 6) or not all(number.strip().isdigit() for number in numbers):
        raise typer.BadParameter(f"'{text}' is not x0,x1,y0,y1 or x0,x1,y0,y1,z0,z1", param_hint="--box")
    return [int(number) for number in numbers]


@app.command("export-model", rich_help_panel=LOOK)
def export_model(
    model: Annotated[Path, typer.Argument(help="state.safetensors of a site, or a model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="File to write (safetensors).")],
    bundle: ModelBundle = None,
    torchscript: Annotated[Path | None, typer.Option(help="Also write the personal network as TorchScript.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Also write it as ONNX (extra 'export' of pfedsam).")] = None,
    global_: Annotated[bool, typer.Option("--global", help="TorchScript and ONNX of the global model.")] = False,
    set_: Overrides = None,
) -> None:
    """Write one file for `infer`: both parts of a site's model, its settings, labels and metrics; no pickle.

    It holds personal tensors, so it stays at the site. TorchScript and ONNX take images (B, 3, H, W) in [0, 1] as the
    bundle prepares them and give logits; their outputs are checked against the network's before they are kept.
    """
    quiet_libraries()
    with console.status("writing"):
        from pfedsam.inference import export

        overrides = literals(set_ or [])
        info = export.export_model(model, out, bundle, overrides)
        console.print(
            f"{out}: bundle {info['bundle']}, round {info.get('round')}, labels {info['labels']}", highlight=False
        )
        for path, write in ((torchscript, export.export_torchscript), (onnx, export.export_onnx)):
            if path is not None:
                network = export.personal_network(model, bundle, overrides, experts=not global_)
                difference = write(network, path)
                console.print(f"{path}: differs from the network by at most {difference:.1e}", highlight=False)


@app.command(rich_help_panel=LOOK)
def pull(
    job: Annotated[str, typer.Argument(help="Id of a finished job.")],
    state: Annotated[Path, typer.Argument(help="state.safetensors of this site.")],
    out: Annotated[Path, typer.Argument(help="File to write: the pair, for `pfedsam infer`.")],
    admin: Admin,
    last: Annotated[bool, typer.Option("--last", help="The last global model instead of the best.")] = False,
    mix: Annotated[
        bool, typer.Option("--mix", help="Pair experts with a global model that they were not trained beside.")
    ] = False,
) -> None:
    """Fetch the best global model of a finished job and pair it with this site's experts.

    Experts are only valid beside the global model that they were trained beside; that is checked. After a whole job
    this is the last one, which the state holds already.
    """
    import tempfile

    with console.status("fetching"):
        from pfedsam.federated.admin import connect, fetch
        from pfedsam.inference.pair import pair
        from pfedsam.site_model import write

        name = "global_model.safetensors" if last else "best_global_model.safetensors"
        with tempfile.TemporaryDirectory(prefix="pfedsam-pull-") as scratch, connect(admin) as session:
            file = fetch(session, job, Path(scratch)).file(name)
            if file is None:
                raise PFedSAMError("E22", f"job {job} has no {name}.", "Take --last, or another job.")
            model = pair(file, state, mix)
    write(out, model)
    console.print(f"{out}: use it with `pfedsam infer --model {out}`; it stays at this site", highlight=False)


@app.command(rich_help_panel=TRAIN)
def personalize(
    site: Annotated[Path, typer.Argument(help="Site folder with labelled cases.")],
    global_model: Annotated[Path, typer.Option("--global", help="global_model.safetensors of a federation.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, table and pictures.")] = Path("runs/personalize"),
    bundle: Annotated[str, typer.Option(help="Name of an installed bundle.")] = "brain_lesion_mri",
    strategy: Annotated[str, typer.Option(help="Its final phase is what is trained.")] = "pfedsam",
    cases: Annotated[
        int, typer.Option(min=1, help="Train on at most so many cases; 5 help where the global model finds some.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Of the split and the draws.")] = 0,
    checkpoint: Checkpoint = None,
    set_: Overrides = None,
) -> None:
    """A new hospital without a federation: fit a personal model beside a global one, and see what it gained.

    Trains on the site's training cases only and compares both models on its test cases. Nothing is sent.
    """
    quiet_libraries()
    with console.status("reading the site"):
        from pfedsam.inference.personalize import fit_personal

        overrides = {"seed": seed, **literals(set_ or [])}
        file = find_overrides(strategy) | overrides
        path = fit_personal(bundle, site, global_model, out, strategy, file, cases, checkpoint)
    console.print(f"personal model: {path} (it stays here; use it with `pfedsam infer --model {path}`)")
    show_evaluation({site.name: (site, path)}, bundle, file, out, {})


def find_overrides(strategy: str) -> dict[str, Any]:
    """What a strategy needs of the bundle."""
    from pfedsam.strategies import find_strategy

    return dict(find_strategy(strategy).overrides)
