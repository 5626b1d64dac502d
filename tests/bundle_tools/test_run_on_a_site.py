"""`python -m monai.bundle run` of a bundle's inference, as a process: every image of the site, or a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from image_files import head, nifti, series
from PIL import Image

from pfedsam.bundles import find_bundle, network_of
from pfedsam.data.reader import load_picture
from pfedsam.data.suffixes import case_name
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, write

TINY = {"backbone": "vit_test", "image_size": 64}


def run(tmp_path: Path, site: Path, bundle: str) -> subprocess.CompletedProcess[str]:
    model = tmp_path / "model.safetensors"
    write(model, SiteModel.of(network_of(bundle, TINY), Roles(), bundle=bundle, overrides=TINY, round=1))
    root = find_bundle(bundle)
    told = {"dataset_dir": site, "output_dir": tmp_path / "out", "model_file": model, "bundle_root": root, **TINY}
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", f"{root}/configs/inference.json"]
    words += ["--meta_file", f"{root}/configs/metadata.json"]
    words += [part for key, value in told.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def test_every_image_of_a_site_has_a_result_named_after_its_case(tmp_path: Path) -> None:
    images = tmp_path / "site [1]" / "images"
    nifti(images / "a.NII.GZ", head(), np.diag([3.0, 3, 4, 1]))
    series(images / "1.2.840.1", head())
    series(images / "1.2.840.2", head())
    Image.fromarray(head((40, 30, 3))[..., 1].T.astype(np.uint8)).save(images / "b.tif")
    done = run(tmp_path, tmp_path / "site [1]", "brain_lesion_mri")
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert names == [f"{case}_lesion.nii.gz" for case in ("1.2.840.1", "1.2.840.2", "a", "b")]
    for image in images.iterdir():
        read = load_picture(image)
        label = nibabel.load(tmp_path / "out" / f"{case_name(image)}_lesion.nii.gz")
        assert label.shape == read.volume_shape, image
        np.testing.assert_allclose(label.affine, np.eye(4) if read.affine is None else read.affine, atol=1e-5)


def test_what_would_be_left_out_is_named(tmp_path: Path) -> None:
    images = tmp_path / "site" / "images"
    nifti(images / "a.nii.gz", head())
    (images / "b.mha").touch()
    done = run(tmp_path, tmp_path / "site", "brain_lesion_mri")
    assert done.returncode != 0 and "b.mha" in done.stderr + done.stdout
