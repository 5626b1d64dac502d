"""`pfedsam infer`, `export-model` and `personalize`: the trained model in use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam import defaults
from pfedsam.commands.console import (
    Force,
    ModelBundle,
    Overrides,
    bar,
    console,
    literals,
    quiet_libraries,
)
from pfedsam.commands.evaluation import show_evaluation
from pfedsam.commands.interrupts import ends_in_order
from pfedsam.commands.listing import LOOK, TRAIN
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ownership import require_free, require_ours, use
from pfedsam.ranges import LARGEST_SEED, MOST_CASES

app = typer.Typer()

#: What `personalize` writes in its folder.
MODEL_FILE = "model.safetensors"
OfStrategy = Annotated[
    str | None, typer.Option(help="Of a `compare`: whose model. By default the one strategy that there is.")
]
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
    model: Annotated[
        Path | None, typer.Option(help="A site's state.safetensors, or its exported model; or --run and --site.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a finished `simulate`, `demo` or `compare`; in place of --model.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Of --run: whose model.")] = None,
    strategy: OfStrategy = None,
    seed: Annotated[int | None, typer.Option(help="Of a `compare`: of which seed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/infer"),
    bundle: ModelBundle = None,
    global_: Annotated[bool, typer.Option("--global", help="The global model: experts off.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write probabilities too.")] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Write the outlines on the picture, or on the largest slice, too.")
    ] = False,
    mask: Annotated[
        str,
        typer.Option(help="Of a picture: palette (class numbers, each with a colour), or white (one class: 0, 255)."),
    ] = "palette",
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="For a DICOM series a segmentation object too.")
    ] = False,
    box: Annotated[
        str | None,
        typer.Option(help="x0,x1,y0,y1[,z0,z1]: pixels or voxels of the one image; for models trained with boxes."),
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
    <out>/<name>_<classes>: NIfTI of volumes, PNG of pictures, also of an X-ray in DICOM (probabilities in 16 bits,
    65535 is 1); two images that would have one result are refused. A file that is there already, also a
    result of an earlier call, which somebody may have corrected, is replaced with --force only; an image that is given,
    never. What cannot be read is named at the end, the other images are done, and the exit code is 1. Research only,
    not for diagnostic use.
    """
    overrides = literals(set_ or [])
    quiet_libraries()
    corners = _box(box)
    if corners is not None and len(images) != 1:
        raise PFedSAMError(ErrorCode.CONTRADICTION, "a box is for one image.", "Give one image, or leave the box out.")
    chosen = _model_file(model, run, site, strategy, seed, global_)
    with ends_in_order(f"What is in {out} is whole."):
        with console.status("loading the model"):
            from pfedsam.api import load_model
            from pfedsam.inference.results import Wanted
            from pfedsam.inference.writers import check_results
            from pfedsam.storage.state_files import described

            how: dict[str, Any] = {"overrides": overrides, "bundle": bundle, "checkpoint": checkpoint, "engine": engine}
            loaded = load_model(chosen, which="global" if global_ else "personal", **how)
        console.print(described(loaded.file), highlight=False, soft_wrap=True)
        wanted = Wanted(loaded.class_names, loaded.bundle, loaded.which, probabilities, overlay, dicom_seg, mask)
        check_results(images, out, wanted.class_names, force, wanted.endings())
        if dicom_seg:
            from pfedsam.inference.segmentation import check_series, is_series

            check_series([image for image in images if image.exists() and is_series(image)])
        _segment_all(loaded, images, corners, wanted, out)


def _segment_all(loaded: Any, images: list[Path], corners: list[int] | None, wanted: Any, out: Path) -> None:
    """Segment one image after the other; those that go wrong are named at the end, with exit code 1."""
    from pfedsam.inference.results import write_results

    lines: list[str] = []
    failed: list[tuple[Path, PFedSAMError]] = []
    with bar("segmenting", len(images)) as advance:
        for number, image in enumerate(images, 1):
            try:
                lines += write_results(loaded.segment(image, corners).prediction, out, wanted)
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


def _model_file(
    model: Path | None, run: Path | None, site: str | None, strategy: str | None, seed: int | None, shared: bool
) -> Path:
    """The one model that is meant by --model, or by --run and what chooses in it."""
    if (model is None) == (run is None):
        raise typer.BadParameter("give one of --model and --run (with --site)", param_hint="--model")
    from pfedsam.storage.run_models import find_run_model

    if run is not None and not run.is_dir():
        raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, f"there is no run folder {run}.", "Give the --out of the run.")
    return find_run_model(run or model or Path(), site, strategy, seed, shared=shared)[0]


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
    bundle prepares them and give logits; their outputs are checked against the network's before they are kept. All
    files are written, or none: stopped, it leaves nothing behind. A file that is there already is replaced with --force
    only.
    """
    overrides = literals(set_ or [])
    files = [model, *(path for path in (out, torchscript, onnx) if path is not None)]
    for number, file in enumerate(files[1:], 1):
        require_free(file, force, keep=files[:number])
    quiet_libraries()
    with ends_in_order("Nothing was written."):
        with console.status("loading libraries"):
            from pfedsam.inference.export import export_all
            from pfedsam.storage.state_files import described

            console.print(described(model), highlight=False, soft_wrap=True)
        steps = 1 + 3 * sum(path is not None for path in (torchscript, onnx))
        with bar("writing", steps) as advance:
            done = 0

            def event(text: str) -> None:
                nonlocal done
                advance(done, text)
                done += 1

            lines = export_all(
                model, out, bundle, overrides, torchscript=torchscript, onnx=onnx, experts=not global_, event=event
            )
            advance(steps, "written")
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)


@app.command(rich_help_panel=LOOK)
def pull(
    job: Annotated[str, typer.Argument(help="Id of a finished job, or a global model that somebody handed over.")],
    state: Annotated[Path, typer.Argument(help="state.safetensors of this site.")],
    out: Annotated[Path, typer.Argument(help="File to write: the pair, for `pfedsam infer`.")],
    admin: Annotated[
        Path | None, typer.Option(help="Startup kit of an administrator; for a file that was handed over, none.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last global model instead of the best.")] = False,
    mix: Annotated[
        bool, typer.Option("--mix", help="Pair experts with a global model that they were not trained beside.")
    ] = False,
    force: Force = False,
) -> None:
    """Fetch the best global model of a finished job and pair it with this site's experts.

    The result of a job is for who submitted it, for an org_admin of the same organisation and for the project
    administrator. Anybody else gives the file best_global_model.safetensors, which one of them hands over.

    Experts are only valid beside the global model that they were trained beside; that is checked. After a whole job
    this is the last one, which the state holds already.
    """
    import tempfile

    handed_over = Path(job) if Path(job).is_file() else None
    if handed_over is None and admin is None:
        raise typer.BadParameter(f"'{job}' is no file: to fetch the model of a job, give a kit", param_hint="--admin")
    require_free(out, force, keep=(state,) if handed_over is None else (state, handed_over))
    with console.status("fetching"):
        from pfedsam.deployment.admin import connect, fetch
        from pfedsam.inference.pair import pair
        from pfedsam.storage.site_model import write

        name = "global_model.safetensors" if last else "best_global_model.safetensors"
        if handed_over is not None or admin is None:
            model = pair(Path(job), state, mix)
        else:
            with tempfile.TemporaryDirectory(prefix="pfedsam-pull-") as scratch, connect(admin) as session:
                file = fetch(session, job, Path(scratch)).file(name)
                if file is None:
                    message = f"job {job} has no {name}."
                    raise PFedSAMError(ErrorCode.DEPLOYMENT, message, "Take --last, or another job.")
                model = pair(file, state, mix)
    write(out, model)
    console.print(f"{out}: use it with `pfedsam infer --model {out}`; it stays at this site", highlight=False)


@app.command(rich_help_panel=TRAIN)
def personalize(
    site: Annotated[Path, typer.Argument(help="Site folder with labelled cases.")],
    global_model: Annotated[
        Path,
        typer.Option(
            "--global", help="global_model.safetensors or a site's model; or the folder of a `simulate` or `compare`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model, table and pictures.")] = Path("runs/personalize"),
    bundle: ModelBundle = None,
    strategy: Annotated[str, typer.Option(help="Its final phase is what is trained.")] = defaults.STRATEGY,
    cases: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_CASES, help="Train on at most so many cases; 5 help where the global model finds some."
        ),
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the split and the draws.")] = 0,
    of_strategy: OfStrategy = None,
    of_seed: Annotated[int | None, typer.Option(help="Of a `compare`: of which seed the global model is.")] = None,
    checkpoint: Checkpoint = None,
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """A new hospital without a federation: fit a personal model beside a global one, and see what it gained.

    Bundle and settings are those of the global model. Trains on the site's training cases only and compares both models
    on its test cases. Nothing is sent. A model that an earlier call has left in --out is replaced with --force only.
    """
    given = {"seed": seed, **literals(set_ or [])}
    require_ours(out, "personal model", force)
    quiet_libraries()
    with console.status("reading the global model and the site"):
        from pfedsam.bundles import require_settings
        from pfedsam.inference.global_start import find_start

        require_free(out / MODEL_FILE, force, keep=(global_model,))
        start = find_start(global_model, of_strategy, of_seed)
        named = bundle or start.bundle
        if named is None:
            raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, f"{start.file} names no bundle.", "Name it: --bundle.")
        settings = start.overrides | find_overrides(strategy) | given
        require_settings(named, settings)
        use(out, "personal model", force)
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        console.print(f"{start.file}: bundle {named}, {told}", highlight=False, soft_wrap=True)
        from pfedsam.inference.personalize import fit_personal

        path = fit_personal(named, site, start, out, strategy, settings, cases, checkpoint)
    console.print(f"personal model: {path} (it stays here; use it with `pfedsam infer --model {path}`)", soft_wrap=True)
    show_evaluation({site.name: (site, path)}, named, settings, out, {})


def find_overrides(strategy: str) -> dict[str, Any]:
    """What a strategy needs of the bundle."""
    from pfedsam.training.catalogue import find_strategy

    return dict(find_strategy(strategy).overrides)
