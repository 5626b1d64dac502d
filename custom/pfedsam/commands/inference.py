"""`pfedsam infer`, `export-model` and `personalize`: the trained model in use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam import defaults
from pfedsam.commands.console import (
    Admin,
    Force,
    ModelBundle,
    Overrides,
    bar,
    console,
    literals,
    quiet_libraries,
)
from pfedsam.commands.evaluation import show_evaluation
from pfedsam.commands.listing import LOOK, TRAIN
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ownership import require_free, require_ours, use
from pfedsam.ranges import LARGEST_SEED, MOST_CASES

app = typer.Typer()

#: What `personalize` writes in its folder.
MODEL_FILE = "model.safetensors"
Model = Annotated[Path, typer.Option("--model", help="state.safetensors or exported model of a site.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(envvar="PFEDSAM_CHECKPOINT", help="Path of the base weights; by default the bundle's."),
]


@app.command(rich_help_panel=LOOK)
def infer(
    images: Annotated[
        list[Path],
        typer.Argument(help="NIfTI, PNG, JPG, TIFF or DICOM files, or folders of one DICOM series each."),
    ],
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
    engine: Annotated[
        str,
        typer.Option(
            help="What computes on a CPU: torch, onnx (extra 'export' of pfedsam; keeps a graph beside the model), or "
            "auto, which takes onnx once it saves time."
        ),
    ] = "auto",
    checkpoint: Checkpoint = None,
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """Segment images with a site's model. The label lies exactly on its image: same shape, affine, orientation.

    Value 0 is background, 1 the bundle's first class and so on. Results are named after the image,
    <out>/<name>_<classes>; two images that would have one result are refused. A file that is there already, also a
    result of an earlier call, which somebody may have corrected, is replaced with --force only; an image that is given,
    never. What cannot be read is named at the end, the other images are done, and the exit code is 1. Research only,
    not for diagnostic use.
    """
    overrides = literals(set_ or [])
    quiet_libraries()
    corners = _box(box)
    if corners is not None and len(images) != 1:
        raise PFedSAMError(ErrorCode.CONTRADICTION, "a box is for one image.", "Give one image, or leave the box out.")
    with console.status("loading the model"):
        from pfedsam.api import load_model
        from pfedsam.inference.writers import OVERLAY, PROBABILITY, SEGMENTATION, check_results
        from pfedsam.storage.state_files import described

        how: dict[str, Any] = {"overrides": overrides, "bundle": bundle, "checkpoint": checkpoint, "engine": engine}
        loaded = load_model(model, which="global" if global_ else "personal", **how)
    console.print(described(loaded.file), highlight=False, soft_wrap=True)
    labels = list(loaded.class_names)
    asked = {PROBABILITY: probabilities, OVERLAY: overlay, SEGMENTATION: dicom_seg}
    check_results(images, out, labels, force, [ending for ending, wanted in asked.items() if wanted])
    if dicom_seg:
        from pfedsam.inference.segmentation import check_series, is_series

        check_series([image for image in images if image.exists() and is_series(image)])
    lines: list[str] = []
    failed: list[tuple[Path, PFedSAMError]] = []
    with bar("segmenting", len(images)) as advance:
        for number, image in enumerate(images, 1):
            try:
                prediction = loaded.segment(image, corners).prediction
                lines += _write(prediction, out, labels, loaded.bundle, probabilities, overlay, dicom_seg)
            except PFedSAMError as error:
                failed.append((image, error))
            # a library that writes one format must not cost the other images
            except Exception as error:
                text = f"{image}: its results could not be written ({type(error).__name__}: {error})."
                failed.append(
                    (image, PFedSAMError(ErrorCode.UNREADABLE_IMAGE, text, "Try it without its optional results."))
                )
            advance(number, image.name)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if len(images) == 1 and failed:
        raise failed[0][1]
    if failed:
        console.print(f"{len(failed)} of {len(images)} images failed:", highlight=False)
        for image, fault in failed:
            console.print(f"{image}: {fault}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def _write(
    prediction: Any, out: Path, labels: list[str], bundle: str, probabilities: bool, overlay: bool, dicom_seg: bool
) -> list[str]:
    """Write the results of one image; returns what to say of them."""
    from pfedsam.data.field_of_view import told
    from pfedsam.inference.segmentation import is_series, write_segmentation
    from pfedsam.inference.writers import OVERLAY, stem_of, write_label, write_probabilities

    label, source = prediction.label(), prediction.image.source
    stem = stem_of(source, out, labels)
    path, voxels = write_label(label, prediction.image, stem), int((label > 0).sum())
    if probabilities:
        write_probabilities(prediction.probabilities, prediction.image, stem)
    if dicom_seg and is_series(source):
        write_segmentation(label, source, stem, labels, f"pFedSAM {bundle}")
    if overlay:
        from pfedsam.inference.overlay import write_overlay

        write_overlay(prediction, stem.with_name(stem.name + OVERLAY))
    lines = [f"{path}: {voxels:,} voxels" if voxels else f"{path}: nothing found"]
    lines += [f"  {source.name}: {remark}" for remark in prediction.remarks]
    if prediction.share_unseen >= 0.005:
        lines.append(f"  {source.name}: {told(prediction.share_unseen, prediction.field_of_view)}")
    return lines


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
    force: Force = False,
) -> None:
    """Write one file for `infer`: both parts of a site's model, its settings, labels and metrics; no pickle.

    It holds personal tensors, so it stays at the site. TorchScript and ONNX take images (B, 3, H, W) in [0, 1] as the
    bundle prepares them and give logits; their outputs are checked against the network's before they are kept. A file
    that is there already is replaced with --force only.
    """
    overrides = literals(set_ or [])
    files = [model, *(path for path in (out, torchscript, onnx) if path is not None)]
    for number, file in enumerate(files[1:], 1):
        require_free(file, force, keep=files[:number])
    quiet_libraries()
    with console.status("writing"):
        from pfedsam.inference import export
        from pfedsam.storage.state_files import described

        console.print(described(model), highlight=False, soft_wrap=True)
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
    force: Force = False,
) -> None:
    """Fetch the best global model of a finished job and pair it with this site's experts.

    Experts are only valid beside the global model that they were trained beside; that is checked. After a whole job
    this is the last one, which the state holds already.
    """
    import tempfile

    require_free(out, force, keep=(state,))
    with console.status("fetching"):
        from pfedsam.deployment.admin import connect, fetch
        from pfedsam.inference.pair import pair
        from pfedsam.storage.site_model import write

        name = "global_model.safetensors" if last else "best_global_model.safetensors"
        with tempfile.TemporaryDirectory(prefix="pfedsam-pull-") as scratch, connect(admin) as session:
            file = fetch(session, job, Path(scratch)).file(name)
            if file is None:
                raise PFedSAMError(ErrorCode.DEPLOYMENT, f"job {job} has no {name}.", "Take --last, or another job.")
            model = pair(file, state, mix)
    write(out, model)
    console.print(f"{out}: use it with `pfedsam infer --model {out}`; it stays at this site", highlight=False)


@app.command(rich_help_panel=TRAIN)
def personalize(
    site: Annotated[Path, typer.Argument(help="Site folder with labelled cases.")],
    global_model: Annotated[Path, typer.Option("--global", help="global_model.safetensors of a federation.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, table and pictures.")] = Path("runs/personalize"),
    bundle: Annotated[str, typer.Option(help="Name of an installed bundle.")] = defaults.BUNDLE,
    strategy: Annotated[str, typer.Option(help="Its final phase is what is trained.")] = "pfedsam",
    cases: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_CASES, help="Train on at most so many cases; 5 help where the global model finds some."
        ),
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the split and the draws.")] = 0,
    checkpoint: Checkpoint = None,
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """A new hospital without a federation: fit a personal model beside a global one, and see what it gained.

    Trains on the site's training cases only and compares both models on its test cases. Nothing is sent. A model that
    an earlier call has left in --out is replaced with --force only.
    """
    overrides = {"seed": seed, **literals(set_ or [])}
    require_ours(out, "personal model", force)
    require_free(out / MODEL_FILE, force, keep=(global_model,))
    quiet_libraries()
    with console.status("reading the site"):
        from pfedsam.bundles import require_settings

        file = find_overrides(strategy) | overrides
        require_settings(bundle, file)
        use(out, "personal model", force)
        from pfedsam.inference.personalize import fit_personal

        path = fit_personal(bundle, site, global_model, out, strategy, file, cases, checkpoint)
    console.print(f"personal model: {path} (it stays here; use it with `pfedsam infer --model {path}`)")
    show_evaluation({site.name: (site, path)}, bundle, file, out, {})


def find_overrides(strategy: str) -> dict[str, Any]:
    """What a strategy needs of the bundle."""
    from pfedsam.training.catalogue import find_strategy

    return dict(find_strategy(strategy).overrides)
