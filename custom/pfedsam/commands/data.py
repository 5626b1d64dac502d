"""`pfedsam phantom`, `validate`, `split` and `prepare`: site folders."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pfedsam import defaults
from pfedsam.commands.console import Bundle, Force, Overrides, bar, console, literals
from pfedsam.commands.listing import DATA
from pfedsam.errors import ErrorCode
from pfedsam.ranges import LARGEST_SEED, MOST_CASES, MOST_SITES

app = typer.Typer()


@app.command(rich_help_panel=DATA)
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the site folders to.")],
    sites: Annotated[
        int, typer.Option(min=2, max=MOST_SITES, help="Number of sites; the last is the most shifted.")
    ] = 4,
    cases: Annotated[int, typer.Option(min=3, max=MOST_CASES, help="Cases of each site.")] = 12,
    size: Annotated[int, typer.Option(min=16, max=2048, help="In-plane voxels of a side.")] = 96,
    slices: Annotated[int, typer.Option(min=4, max=2048, help="Slices of a case.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Same seed, same volumes.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a phantom with other settings; a folder of anything else never.")
    ] = False,
) -> None:
    """Write a phantom federation: head volumes with lesions as NIfTI, each site with its own scanner.

    A phantom with the same settings that is there already stays as it is, also where its files were changed. Another
    one is replaced with --force only, a folder of anything else never; a datalist.json that you changed is kept as
    datalist.json.before.
    """
    folders = make_phantom(out, sites, cases, (size, size, slices), seed, force)
    console.print(f"{len(folders)} site folders with {cases} cases each in {out}")
    console.print(f"Next: pfedsam validate {out / 'site-1'}    or: pfedsam simulate {out} --out runs/simulation")


@app.command(rich_help_panel=DATA)
def validate(
    site: Annotated[Path, typer.Argument(help="Site folder with images/ and labels/.")],
    bundle: Bundle = defaults.BUNDLE,
    labels: Annotated[
        str | None, typer.Option(help="Values that the labels may hold, with commas; by default the bundle's.")
    ] = None,
    minimum_cases: Annotated[int, typer.Option(min=1, help="Fewer cases are an error.")] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the split; it chooses the test fold.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Files only: do not load a case through the bundle's own transforms.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Check a site folder before it joins: pairs, values, labels, geometry, duplicates, splits. Changes nothing.

    At the end the first training batch and the first validation case are loaded as training would load them. An image
    of a strongly compressed file that claims to unpack to more than 0.5 GB is refused; the environment variable
    PFEDSAM_IMAGE_LIMIT_GB sets another limit.
    """
    from pfedsam.bundles import require_settings

    settings = {"seed": seed, **literals(set_ or [])}
    require_settings(bundle, settings)
    from pfedsam.data.check_report import print_report
    from pfedsam.data.checks import check_site
    from pfedsam.data.expected import expected_by

    expected = expected_by(bundle, settings)
    known = expected["labels"]
    values = _numbers(labels) if labels else known
    # JSON alone is to be on standard output
    with nullcontext(None) if as_json else bar("reading all cases", 1) as advance:
        expected["labels"], progress = values, advance.total if advance else None
        report = check_site(site, **expected, minimum_cases=minimum_cases, progress=progress)
    if report.ok and not quick:
        if values != known:
            text = f"no case was loaded through the bundle: --labels gives {values}, the bundle's are {known}."
            report.add(
                ErrorCode.LABEL_OUT_OF_RANGE,
                "note",
                "",
                text,
                "A site maps its own values with 'labels' in local/pfedsam.json.",
            )
        else:
            with console.status("loading the first batch through the bundle's transforms"):
                from pfedsam.training.rehearsal import rehearse

                rehearse(report, bundle, site, settings)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, console)
    raise typer.Exit(0 if report.ok else 1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(value) for value in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers, as 0,1,2", param_hint="--labels") from None


@app.command(rich_help_panel=DATA)
def split(
    data: Annotated[Path, typer.Argument(help="Site folder, or folder that holds site folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write site folders of links with their splits into this folder; DATA is only read."),
    ] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="Folds of a first split; 3 by default.")] = None,
    force: Force = False,
) -> None:
    """Write which case is for training, validation or test: <site>/datalist.json, even also for few patients.

    Seed s tests fold s modulo their number; each patient is tested in one fold. Called again when there are new cases
    it adds them: nobody who has a section moves, also in sections that you wrote. Cases of one patient stay together:
    say whose they are first, {"patients": {"<case>": "<patient>"}}. The file as it was is kept as datalist.json.before.

    A first split differs from the one by names that holds without a file: do it before anything is trained.
    """
    from pfedsam.data.site_folder import sites_in
    from pfedsam.data.splitting import link_site, use_for_links, write_datalist

    sites = sites_in(data)
    if out is not None:
        use_for_links(data, sites, out, force)
        sites = [link_site(site, out) for site in sites]
    for site in sites:
        written = write_datalist(site, folds)
        console.print("\n".join(written.lines()), highlight=False, soft_wrap=True)


@app.command(rich_help_panel=DATA)
def prepare(
    kind: Annotated[str, typer.Argument(help="images, fundus or prostate.")],
    source: Annotated[Path, typer.Option(help="Folder as it was downloaded and unpacked.")],
    out: Annotated[Path, typer.Option(help="Folder for the site folders.")],
) -> None:
    """Lay out downloaded data as site folders. The source is not changed.

    images: <site>/images/<case> and <site>/masks or labels/<case>[_mask], each NIfTI, PNG, JPG, TIFF, BMP, DICOM or a
    folder of DICOM slices. Values of masks are kept, 0/255 becomes 0/1.

    fundus: <domain>/<train or test>/ROIs/image/*.png and .../ROIs/mask/*.png (DoFE); or Training400/<group>/*.jpg and
    Annotation-Training400/Disc_Cup_Masks/<group>/*.bmp (REFUGE). Never tried on the original downloads.

    prostate: <site>/<case>.nii.gz and <site>/<case>_segmentation.nii.gz (RUNMC, BMC, I2CVB, UCL, BIDMC, HK). Never
    tried on the original download.
    """
    from pfedsam.data.prepare import prepare as write

    with bar("copying", 1) as advance:
        counts = write(kind, source, out, advance.total)
    for site, cases in counts.items():
        console.print(f"{out / site}: {cases} cases", highlight=False)
    bundle = {"fundus": " --bundle fundus_disc_cup", "prostate": " --bundle prostate_mri"}.get(kind, "")
    console.print(f"Next: pfedsam validate {out / next(iter(counts))}{bundle}", highlight=False)


def make_phantom(
    out: Path, sites: int, cases: int, shape: tuple[int, int, int], seed: int, force: bool = False
) -> list[Path]:
    """Write a phantom federation with a progress bar; returns the site folders."""
    with console.status("loading libraries"):
        from pfedsam.data.phantom import write_phantom

    written = 0

    def show(done: int, total: int) -> None:
        nonlocal written
        written = done
        advance(done)

    with bar("writing phantom cases", sites * cases) as advance:
        folders = write_phantom(out, sites, cases, shape, seed, show, force)
    if not written:
        console.print(f"this phantom is there already: nothing was written to {out}", highlight=False)
    return folders
