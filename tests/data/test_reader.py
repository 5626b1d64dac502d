"""One file of every kind through the one reader: right, or refused with what is wrong with it."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from image_files import AXIAL, SERIES_AFFINE, dicom_slice, enhanced, head, nifti, save_dicom, scaled_nifti, series
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from pfedsam.data.limits import LIMIT_VARIABLE
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError

VALUES = head()
GREY = np.ascontiguousarray(head((20, 14, 1))[..., 0].T.astype(np.uint8))
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], axis=-1)


def refused(path: Path, *words: str, code: str = "E05", label: bool = False) -> None:
    """One sentence of ours that names the file, or the folder, and what is wrong."""
    with pytest.raises(PFedSAMError) as caught:
        load_picture(path, label)
    text = str(caught.value)
    assert caught.value.code == code and str(path) in text and "\n" not in text, text
    assert all(word.lower() in text.lower() for word in words), text


def picture(path: Path, image: Image.Image, **how: Any) -> Path:
    image.save(path, **how)
    return path


# ---- NIfTI ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
def test_nifti_as_nibabel_reads_it(tmp_path: Path, kind: Any, name: str) -> None:
    nibabel.save(kind(VALUES, SERIES_AFFINE), tmp_path / "a.nii.gz")
    (tmp_path / name).write_bytes(
        (tmp_path / "a.nii.gz").read_bytes() if name.lower().endswith("gz") else _unpacked(tmp_path / "a.nii.gz")
    )
    found = load_picture(tmp_path / name)
    np.testing.assert_array_equal(found.values, VALUES)
    np.testing.assert_allclose(found.affine, SERIES_AFFINE)
    assert (found.kind, found.channels, found.spacing, found.orientation) == ("volume", 1, (3, 2.5, 4), "LPS")


def _unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def test_a_scale_in_the_header_is_applied(tmp_path: Path) -> None:
    found = load_picture(scaled_nifti(tmp_path / "a.nii", (VALUES * 2).astype(np.int16), 0.5, -7, SERIES_AFFINE))
    np.testing.assert_allclose(found.values, VALUES - 7.0)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("micron", 1e-3), ("meter", 1e3)])
def test_the_affine_is_in_millimetres_whatever_the_unit(tmp_path: Path, unit: str, factor: float) -> None:
    image = nibabel.Nifti1Image(VALUES, SERIES_AFFINE)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    found = load_picture(tmp_path / "a.nii")
    np.testing.assert_allclose(found.affine[:3], SERIES_AFFINE[:3] * factor)
    assert bool(found.notes) == (unit != "mm")


@pytest.mark.parametrize("shape", [(24, 20), (24, 20, 6, 1), (24, 20, 6, 1, 1)])
def test_axes_of_length_one_are_kept_for_the_label(tmp_path: Path, shape: tuple[int, ...]) -> None:
    size = shape[:3] + (1,) * (3 - len(shape))
    values = head(size)
    found = load_picture(nifti(tmp_path / "a.nii", values.reshape(shape)))
    np.testing.assert_array_equal(found.values, values)
    assert found.label_shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.tif"])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, value: float, name: str) -> None:
    values = VALUES.astype(np.float32)
    values[0, :2, 0] = value
    if name == "a.tif":
        picture(tmp_path / name, Image.fromarray(values[..., 0]))
    else:
        nifti(tmp_path / name, values)
    refused(tmp_path / name, "2 value(s)", "not finite", code="E09")


def test_a_nan_in_floating_point_dicom_is_counted(tmp_path: Path) -> None:
    data = dicom_slice(VALUES[..., 0], (0, 0, 0))
    data.SeriesInstanceUID = generate_uid()
    del data.PixelData, data.RescaleSlope, data.RescaleIntercept
    pixels = VALUES[..., 0].T.astype(np.float32)
    data.BitsAllocated, data.FloatPixelData = 32, pixels.tobytes()
    del data.BitsStored, data.HighBit, data.PixelRepresentation
    found = load_picture(save_dicom(tmp_path / "a.dcm", data))
    np.testing.assert_array_equal(found.values[..., 0], VALUES[..., 0])
    pixels[3, 2] = np.nan
    data.FloatPixelData = pixels.tobytes()
    refused(save_dicom(tmp_path / "b.dcm", data), "1 value(s)", "not finite", code="E09")


RGB = np.zeros(VALUES.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
NO_VOLUMES = {
    "several channels": (np.stack([VALUES] * 2, -1), ("2 channels", "one channel")),
    "colour voxels": (RGB, ("colour", "one channel")),
    "complex numbers": (VALUES.astype(np.complex64), ("complex64", "real numbers")),
    "one axis": (VALUES[:, 0, 0], ("expected a volume",)),
}


@pytest.mark.parametrize(("values", "words"), NO_VOLUMES.values(), ids=NO_VOLUMES)
def test_nifti_that_is_no_volume_of_one_channel(tmp_path: Path, values: np.ndarray, words: tuple[str, ...]) -> None:
    refused(nifti(tmp_path / "a.nii", values), *words)


@pytest.mark.parametrize("value", [0.0, np.nan], ids=["flat", "nan"])
def test_an_affine_that_maps_nothing(tmp_path: Path, value: float) -> None:
    content = bytearray(nifti(tmp_path / "a.nii", VALUES).read_bytes())
    # srow_x of a NIfTI-1 header, four numbers of single precision
    content[280:296] = np.array([value, 0, 0, 0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    refused(tmp_path / "a.nii", "affine")


def test_a_damaged_file_is_no_image(tmp_path: Path) -> None:
    whole = nifti(tmp_path / "a.nii.gz", VALUES).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.nii.gz", "cannot be read")
    changed = bytearray(whole)
    changed[-8] ^= 1  # the checksum that gzip keeps of what was packed
    (tmp_path / "changed.nii.gz").write_bytes(changed)
    refused(tmp_path / "changed.nii.gz", "cannot be read", "CRC")


# ---- PNG, JPEG, TIFF ------------------------------------------------------------------------------------------------

WIDE = GREY.astype(np.uint16) * 257
PLAIN: dict[str, tuple[Image.Image, str, Any, float | None]] = {
    "8 bits": (Image.fromarray(GREY), "a.png", GREY, 255),
    "16 bits": (Image.fromarray(WIDE), "a.png", WIDE, 65535),
    "16 bits, TIFF": (Image.fromarray(WIDE), "a.tiff", WIDE, 65535),
    "signed 32 bits": (Image.fromarray(GREY.astype(np.int32) - 100), "a.tif", GREY.astype(int) - 100, None),
    "floating point": (Image.fromarray(GREY / np.float32(7)), "a.tif", GREY / np.float32(7), None),
    "black and white": (Image.fromarray(GREY > 30), "a.png", 255 * (GREY > 30), 255),
    "colour": (Image.fromarray(COLOUR), "A.PNG", COLOUR, 255),
    "bitmap": (Image.fromarray(COLOUR), "a.bmp", COLOUR, 255),
    "grey with alpha": (Image.fromarray(GREY).convert("LA"), "a.png", GREY, 255),
    "colour with alpha": (Image.fromarray(COLOUR).convert("RGBA"), "a.png", COLOUR, 255),
}


@pytest.mark.parametrize(("image", "name", "expected", "white"), PLAIN.values(), ids=PLAIN)
def test_pictures_have_the_numbers_that_are_stored(
    tmp_path: Path, image: Image.Image, name: str, expected: np.ndarray, white: float | None
) -> None:
    found = load_picture(picture(tmp_path / name, image))
    np.testing.assert_array_equal(found.values, np.swapaxes(expected, 0, 1))
    assert (found.kind, found.affine, found.white) == ("picture", None, white)


def test_a_picture_is_shown_as_it_is_stored_top_row_first(tmp_path: Path) -> None:
    found = load_picture(picture(tmp_path / "a.png", Image.fromarray(COLOUR)))
    np.testing.assert_array_equal(found.rows(found.plane(0)), COLOUR)


def test_unsigned_32_bits_stay_positive(tmp_path: Path) -> None:
    large = GREY.astype(np.uint32) + 3_000_000_000
    path = picture(tmp_path / "a.tif", Image.fromarray(large.view(np.int32)))
    _change_tag(path, 339, 2, 1)  # SampleFormat: signed becomes unsigned
    np.testing.assert_array_equal(load_picture(path).values, large.T)


def _change_tag(path: Path, tag: int, old: int, new: int) -> None:
    """Change the one value, a SHORT, of a tag in a little-endian TIFF."""
    entry = tag.to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00"
    content = path.read_bytes()
    assert content.count(entry + bytes([old])) == 1
    path.write_bytes(content.replace(entry + bytes([old]), entry + bytes([new])))


@pytest.mark.parametrize("bits", [8, 16])
def test_white_is_zero_is_turned_in_8_and_in_16_bits(tmp_path: Path, bits: int) -> None:
    """A film: the file says that 0 is white; a viewer shows the turned values."""
    stored = GREY if bits == 8 else WIDE
    path = picture(tmp_path / "a.tif", Image.fromarray(stored))
    _change_tag(path, 262, 1, 0)  # PhotometricInterpretation: black is zero becomes white is zero
    np.testing.assert_array_equal(load_picture(path).values, (2**bits - 1 - stored.astype(int)).T)


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "a.tif"), ("CMYK", "a.jpg"), ("P", "a.png"), ("YCbCr", "a.tif")])
def test_other_colour_spaces_become_the_colours_that_are_seen(tmp_path: Path, mode: str, name: str) -> None:
    flat = np.zeros((16, 24, 3), np.uint8)
    flat[:8], flat[8:, 8:] = (200, 40, 40), (20, 120, 220)
    image = Image.fromarray(flat).quantize(8) if mode == "P" else Image.fromarray(flat).convert(mode)
    found = load_picture(picture(tmp_path / name, image, quality=100))
    assert found.values.shape == (24, 16, 3) and "read as colours" in found.notes[0]
    # palettes, YCbCr and JPEG round
    assert np.abs(found.values.astype(int) - np.swapaxes(flat, 0, 1)).mean() < 12


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_pictures_are_turned_upright(tmp_path: Path, name: str, orientation: int) -> None:
    upright = np.zeros((12, 20), np.uint8)
    upright[1:4, 2:10] = 250
    # what has to be stored for a viewer to show `upright` (EXIF 2.3, tag 274)
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright.T, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    how = {"a.jpg": {"quality": 100}, "a.tif": {"compression": "tiff_lzw"}, "a.png": {}}[name]
    exif = Image.Exif()
    exif[274] = orientation
    path = picture(tmp_path / name, Image.fromarray(np.ascontiguousarray(stored)), exif=exif, **how)
    found = load_picture(path)
    assert np.abs(found.values.astype(int) - upright.T).max() < 60 and "EXIF" in found.notes[0]


def test_a_sideways_tiff_without_compression_is_refused(tmp_path: Path) -> None:
    """Pillow mixes up its rows (see findings)."""
    exif = Image.Exif()
    exif[274] = 6
    refused(picture(tmp_path / "a.tif", Image.fromarray(GREY), exif=exif), "orientation", "upright")


def test_what_shows_through_is_not_guessed(tmp_path: Path) -> None:
    clear = np.dstack([COLOUR, np.full(GREY.shape, 255, np.uint8)])
    clear[2, 3:5, 3] = (0, 128)
    refused(picture(tmp_path / "a.png", Image.fromarray(clear)), "alpha", "2 transparent")
    refused(picture(tmp_path / "b.png", Image.fromarray(GREY), transparency=int(GREY[0, 0])), "alpha")
    value = int(WIDE[0, 0])
    refused(picture(tmp_path / "c.png", Image.fromarray(WIDE), transparency=value), "alpha")


def test_pages_of_a_tiff_are_slices_or_refused(tmp_path: Path) -> None:
    slices = [Image.fromarray(np.ascontiguousarray(VALUES[..., z].T.astype(np.uint16))) for z in range(6)]
    found = load_picture(picture(tmp_path / "a.tif", slices[0], save_all=True, append_images=slices[1:]))
    np.testing.assert_array_equal(found.values, VALUES)
    assert (found.kind, found.affine) == ("volume", None) and "6 pages" in found.notes[0]
    one = Image.fromarray(GREY)
    other = picture(tmp_path / "b.tif", one, save_all=True, append_images=[Image.fromarray(GREY[:5])])
    refused(other, "page 2 of 2")
    wide = picture(tmp_path / "c.tif", one, save_all=True, append_images=[Image.fromarray(WIDE)])
    refused(wide, "page 2 of 2", "uint16")
    colour = Image.fromarray(COLOUR)
    refused(picture(tmp_path / "d.tif", colour, save_all=True, append_images=[colour]), "colour")
    refused(picture(tmp_path / "e.png", one, save_all=True, append_images=[Image.fromarray(255 - GREY)]), "2 frames")


LABEL = np.resize(np.array([0, 1, 2, 0, 0], np.uint8), (14, 20))


def test_samples_that_pillow_does_not_keep_are_refused_or_restored(tmp_path: Path) -> None:
    wide = np.stack([LABEL.astype(np.uint16)] * 3, -1)
    tifffile.imwrite(tmp_path / "wide.tif", wide, photometric="rgb")
    refused(tmp_path / "wide.tif", "16 bits", code="E07", label=True)
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(wide, -1, 0), photometric="rgb", planarconfig="separate")
    refused(tmp_path / "planes.tif", "planes of 16 bits")
    two = np.stack([GREY, GREY], -1)
    tifffile.imwrite(tmp_path / "two.tif", two, photometric="minisblack", planarconfig="contig")
    refused(tmp_path / "two.tif", "2 samples")
    signed = (GREY.astype(int) - 100).astype(np.int8)
    tifffile.imwrite(tmp_path / "signed.tif", signed)
    np.testing.assert_array_equal(load_picture(tmp_path / "signed.tif").values, signed.T)
    tifffile.imwrite(tmp_path / "bool.tif", LABEL > 0)
    refused(tmp_path / "bool.tif", "0 is white", code="E07", label=True)


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_of_a_label_are_not_stretched(tmp_path: Path, bits: int) -> None:
    """A PNG of 2 or 4 bits, written by hand: Pillow writes 8."""
    packed = np.packbits(np.unpackbits(LABEL[..., None], axis=-1)[..., 8 - bits :].reshape(14, -1), axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 20, 14, bits, 0, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(load_picture(tmp_path / "a.png", label=True).values, LABEL.T)
    # what is seen has all greys from black to white
    assert load_picture(tmp_path / "a.png").values.max() == 2 * 255 // (2**bits - 1)


STACK = np.ascontiguousarray(VALUES.T.astype(np.uint16))
MANY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ImageJ channels": (np.stack([STACK, STACK], 1), {"imagej": True, "metadata": {"axes": "ZCYX"}}, "2 channels"),
    "ImageJ time": (STACK, {"imagej": True, "metadata": {"axes": "TYX"}}, "6 time points"),
    "OME channels": (np.stack([STACK, STACK], 1), {"ome": True, "metadata": {"axes": "ZCYX"}}, "2 channels"),
    "one page for all": (STACK, {"truncate": True}, "6 slices, of which 1"),
    "slices that are no pages": (STACK.repeat(4, 0), {"volumetric": True, "tile": (16, 16, 16)}, "slices, of which 1"),
}


@pytest.mark.parametrize(("values", "how", "words"), MANY.values(), ids=MANY)
def test_a_tiff_of_more_than_one_stack_is_refused(tmp_path: Path, values: Any, how: Any, words: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values, **how)
    refused(tmp_path / "a.tif", words)


@pytest.mark.parametrize("how", [{}, {"imagej": True}, {"ome": True}], ids=str)
def test_one_stack_is_a_volume_whoever_wrote_it(tmp_path: Path, how: Any) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", metadata={"axes": "ZYX"}, **how)
    np.testing.assert_array_equal(load_picture(tmp_path / "a.tif").values, VALUES)


def test_a_camera_preview_behind_a_jpeg_is_left_out(tmp_path: Path) -> None:
    first, preview = Image.fromarray(COLOUR), Image.fromarray(COLOUR[::2, ::2])
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert load_picture(tmp_path / "a.jpg").shape == (20, 14)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.dcm", "a.mha", "a"])
def test_what_is_no_image_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no image")
    refused(tmp_path / name)
    with pytest.raises(PFedSAMError, match="E02"):
        load_picture(tmp_path / "nowhere.png")


# ---- Limits ---------------------------------------------------------------------------------------------------------


def test_a_small_file_that_claims_much_is_refused_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros((400, 400, 20), np.int16)
    files = [
        nifti(tmp_path / "a.nii.gz", zeros),
        picture(tmp_path / "a.png", Image.new("L", (2000, 1500))),
        picture(tmp_path / "a.tif", Image.new("1", (4000, 6000)), compression="group4"),
        save_dicom(tmp_path / "a.dcm", _wide(), DeflatedExplicitVRLittleEndian),
    ]
    for path in files:
        load_picture(path)
    monkeypatch.setenv(LIMIT_VARIABLE, "0.002")
    for path in files:
        refused(path, "claims to unpack", LIMIT_VARIABLE)
    # an honest file is as large as what it holds
    load_picture(nifti(tmp_path / "b.nii", zeros))
    monkeypatch.setenv(LIMIT_VARIABLE, "much")
    with pytest.raises(PFedSAMError, match=f"E01.*{LIMIT_VARIABLE}"):
        load_picture(files[0])


def _wide() -> Dataset:
    data = dicom_slice(np.zeros((1500, 1000), np.int16), (0, 0, 0))
    data.SeriesInstanceUID = generate_uid()
    return data


def test_by_default_half_a_gigabyte_is_much(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", Image.new("L", (25_000, 25_000)), compress_level=9)
    assert path.stat().st_size < 700_000
    refused(path, "0.62 GB", "limit of 0.5 GB")


# ---- DICOM ----------------------------------------------------------------------------------------------------------

SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_a_series_as_highdicom_reads_it(tmp_path: Path, syntax: Any) -> None:
    folder = series(tmp_path / "s", VALUES, syntax=syntax)
    found = load_picture(folder)
    np.testing.assert_array_equal(found.values, VALUES)
    np.testing.assert_allclose(found.affine, SERIES_AFFINE)
    # its axes are slice, row, column, the first against the normal, in DICOM's coordinates
    other = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in folder.iterdir()]).flip_spatial(0)
    to_ours = other.affine[:, [2, 1, 0, 3]]
    to_ours[:2] *= -1
    np.testing.assert_allclose(found.affine, to_ours)
    np.testing.assert_array_equal(found.values, other.array.T)


def test_values_are_in_the_unit_of_the_modality_slice_by_slice(tmp_path: Path) -> None:
    def scale(data: Dataset, z: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = 0.5 + z, -3

    found = load_picture(series(tmp_path / "s", VALUES, edit=scale))
    np.testing.assert_allclose(found.values, VALUES * (0.5 + np.arange(6)) - 3, rtol=1e-6)


@pytest.mark.parametrize("numbers", [[6, 5, 4, 3, 2, 1], [1, 4, 2, 5, 3, 6], [1] * 6, [None] * 6])
def test_slices_are_in_the_order_of_their_position(tmp_path: Path, numbers: list[int | None]) -> None:
    found = load_picture(
        series(tmp_path / "s", VALUES, edit=lambda data, z: setattr(data, "InstanceNumber", numbers[z]))
    )
    np.testing.assert_array_equal(found.values, VALUES)
    np.testing.assert_allclose(found.affine, SERIES_AFFINE)


FINE = {
    "noise": lambda data, z: setattr(data, "ImageOrientationPatient", [1, round(1e-7 * z, 9), 0, 0, 1, 0]),
    "text": lambda data, z: setattr(data, "ImageOrientationPatient", ["1.0", "0", "-0.0", "0", "1", "0"][:6]),
    "spacing": lambda data, z: setattr(data, "PixelSpacing", [2.5 + 1e-6 * (z % 2), 3.0]),
    "rounded positions": lambda data, z: setattr(data, "ImagePositionPatient", [-50, -60, round(-30.02 + 4 * z, 1)]),
}


@pytest.mark.parametrize("edit", FINE.values(), ids=FINE)
def test_noise_in_the_geometry_is_no_difference(tmp_path: Path, edit: Any) -> None:
    found = load_picture(series(tmp_path / "s", VALUES, edit=edit))
    np.testing.assert_allclose(found.affine, SERIES_AFFINE, atol=0.05)


@pytest.mark.parametrize("step", np.random.default_rng(1).uniform(0.5, 1.3, 12).round(4).tolist())
def test_positions_that_are_rounded_to_a_tenth_are_a_volume(tmp_path: Path, step: float) -> None:
    def rounded(data: Dataset, z: int) -> None:
        data.ImagePositionPatient = [-50, -60, round(-30.03 + step * z, 1)]

    values = head((24, 20, 30))
    found = load_picture(series(tmp_path / "s", values, edit=rounded))
    np.testing.assert_array_equal(found.values, values)
    assert abs(found.affine[2, 2] - step) < 0.005 and abs(found.affine[2, 3] + 30.03) < 0.06


@pytest.mark.filterwarnings("ignore:.*DS.*")
def test_long_direction_cosines_are_numbers(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", VALUES)
    turn = np.cos(0.3), np.sin(0.3)
    cosines = f"{turn[0]:.17f}\\{turn[1]:.17f}\\0\\{-turn[1]:.17f}\\{turn[0]:.17f}\\0".encode()
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.add_new(0x00200037, "UN", cosines + b" " * (len(cosines) % 2))
        pydicom.dcmwrite(path, data, implicit_vr=True, little_endian=True, force_encoding=True)
        raw = pydicom.dcmread(path)
        raw.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        pydicom.dcmwrite(path, raw)
    found = load_picture(folder)
    np.testing.assert_allclose(found.affine[:3, 0], [-3 * turn[0], -3 * turn[1], 0], atol=1e-9)


@pytest.mark.parametrize("degrees", [-25, 0.5, 15])
def test_a_tilted_gantry_has_its_true_sheared_affine(tmp_path: Path, degrees: float) -> None:
    """Every voxel lies where PS3.3, C.7.6.2.1.1 says: position + column index * row direction * spacing + ..."""
    angle = np.deg2rad(degrees)
    orientation = (1, 0, 0, 0, round(np.cos(angle), 12), round(-np.sin(angle), 12))
    found = load_picture(series(tmp_path / "s", VALUES, orientation=orientation, step=(0, 0, 4.0)))
    for x, y, z in ((0, 0, 0), (23, 0, 0), (0, 19, 0), (5, 7, 5)):
        place = np.array([-50, -60, -30 + 4.0 * z]) + 3 * x * np.array(orientation[:3])
        place = place + 2.5 * y * np.array(orientation[3:])
        np.testing.assert_allclose((found.affine @ [x, y, z, 1])[:3], place * [-1, -1, 1], atol=1e-4)
    np.testing.assert_array_equal(found.values, VALUES)
    assert f"{abs(degrees):.1f} degrees" in found.notes[0]


@pytest.mark.parametrize("plane", [AXIAL, (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)], ids=["ax", "sag", "cor"])
@pytest.mark.parametrize("direction", [1, -1])
def test_planes_of_every_direction_are_stacked_along_their_normal(
    tmp_path: Path, plane: tuple[float, ...], direction: int
) -> None:
    normal = np.cross(plane[:3], plane[3:])
    found = load_picture(series(tmp_path / "s", VALUES, orientation=plane, step=4.0 * direction * normal))
    expected = VALUES if direction > 0 else VALUES[..., ::-1]
    np.testing.assert_array_equal(found.values, expected)
    place = np.array([-50, -60, -30]) + 4.0 * direction * normal * (0 if direction > 0 else 5)
    np.testing.assert_allclose(found.affine[:3, 3], place * [-1, -1, 1])
    assert np.linalg.det(found.affine[:3, :3]) > 0


def _set(keyword: str, value: Any, at: int | None = None) -> Any:
    return lambda data, z: setattr(data, keyword, value) if at in (None, z) else None


def _mosaic_by_number(data: Dataset, z: int) -> None:
    block = data.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0A, "US", 9)


def _colour(data: Dataset, z: int) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = bytes(data.Rows * data.Columns * 3)


def _frames(data: Dataset, z: int) -> None:
    data.NumberOfFrames = 2
    data.PixelData = data.PixelData * 2


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mosaic": ({"edit": _set("ImageType", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])}, ("mosaic",)),
    "mosaic by its number of tiles": ({"edit": _mosaic_by_number}, ("mosaic",)),
    "localiser": ({"edit": _set("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"], 2)}, ("localiser",)),
    "colour": ({"edit": _colour}, ("colour", "RGB", "3 channels")),
    "palette": ({"edit": _set("PhotometricInterpretation", "PALETTE COLOR")}, ("colour", "PALETTE")),
    "no position": ({"drop": ["ImagePositionPatient"]}, ("ImagePositionPatient (0020,0032)",)),
    "empty position": ({"edit": _set("ImagePositionPatient", None)}, ("ImagePositionPatient (0020,0032)",)),
    "no orientation": ({"drop": ["ImageOrientationPatient"]}, ("ImageOrientationPatient (0020,0037)",)),
    "no spacing": ({"drop": ["PixelSpacing"]}, ("PixelSpacing (0028,0030)",)),
    "no pixels": ({"drop": ["PixelData"]}, ("no pixels",)),
    "no rows": ({"drop": ["Rows"]}, ("Rows (0028,0010)",)),
    "frames that lie nowhere": ({"edit": _frames}, ("2 frames", "functional groups")),
    "zero cosines": ({"edit": _set("ImageOrientationPatient", [0] * 6)}, ("right angle",)),
    "skewed cosines": ({"edit": _set("ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0])}, ("right angle",)),
    "no slope": ({"edit": lambda data, z: z == 2 and data.__delattr__("RescaleSlope")}, ("no RescaleSlope",)),
    "an empty intercept": ({"edit": _set("RescaleIntercept", None, 2)}, ("no RescaleIntercept",)),
    "twice the pixels": ({"edit": lambda data, z: z == 2 and _double(data)}, ("pixels of shape", "expected 1 frame")),
    "slices that walk aside": ({"step": (0, 30.0, 4.0)}, ("sideways",)),
    "fine slices, one missing": (
        {"edit": lambda data, z: _fine(data, z + (z > 3))},
        ("missing or double between slices 4 and 5",),
    ),
    "a segmentation object": ({"edit": _set("Modality", "SEG")}, ("segmentation object",)),
    "spacing of 0": ({"edit": _set("PixelSpacing", [0, 0])}, ("PixelSpacing",)),
    "two sizes": ({"edit": _set("PixelSpacing", [2.5, 3.2], 2)}, ("PixelSpacing of",)),
    "two directions": ({"edit": _set("ImageOrientationPatient", [0.8, 0.6, 0, -0.6, 0.8, 0], 2)}, ("Orientation",)),
    "one aside": ({"edit": _set("ImagePositionPatient", [-48, -60, -18], 3)}, ("ImagePositionPatient of", "2.00 mm")),
    "one missing": ({"edit": lambda data, z: _at(data, z + (z > 3))}, ("missing or double between slices 4 and 5",)),
    "double": ({"edit": lambda data, z: _at(data, z // 2)}, ("double", "same position")),
    "all at one place": ({"edit": lambda data, z: _at(data, 0)}, ("double", "same position")),
    "two series": ({"edit": _set("SeriesInstanceUID", "1.2.3", 2)}, ("SeriesInstanceUID",)),
    "two frames of reference": ({"edit": _set("FrameOfReferenceUID", "1.2.3", 2)}, ("FrameOfReferenceUID",)),
}


def _double(data: Dataset) -> None:
    data.NumberOfFrames = 1
    data.Rows = data.Rows * 2
    data.PixelData = data.PixelData * 2
    data.Rows = data.Rows // 2


def _fine(data: Dataset, place: int) -> None:
    """Slices of micro CT, 0.05 mm apart."""
    data.PixelSpacing, data.ImagePositionPatient = [0.02, 0.02], [-50, -60, round(-30 + 0.05 * place, 4)]


def _at(data: Dataset, place: int) -> None:
    data.ImagePositionPatient = [-50, -60, -30 + 4 * place]


@pytest.mark.parametrize(("how", "words"), WRONG.values(), ids=WRONG)
def test_a_series_that_is_no_volume_is_refused_by_what_it_is(
    tmp_path: Path, how: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(series(tmp_path / "s", VALUES, **how), *words)


def test_a_folder_with_something_else_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", VALUES)
    (folder / ".hidden").write_bytes(b"not looked at")
    load_picture(folder)
    (folder / "note.txt").write_text("no DICOM")
    refused(folder, "note.txt", "no DICOM file")
    (folder / "note.txt").unlink()
    (folder / "more").mkdir()
    refused(folder, "more", "is a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", code="E02")


@pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
def test_one_slice_is_a_volume_of_one_slice(tmp_path: Path, name: str) -> None:
    data = dicom_slice(VALUES[..., 3], (-50, -60, -30))
    data.SeriesInstanceUID = generate_uid()
    found = load_picture(save_dicom(tmp_path / name, data))
    np.testing.assert_array_equal(found.values, VALUES[..., 3:4])
    np.testing.assert_allclose(found.affine, SERIES_AFFINE)


@pytest.mark.parametrize("shuffle", [False, True])
def test_frames_are_read_through_their_functional_groups(tmp_path: Path, shuffle: bool) -> None:
    def scale(data: Dataset, z: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = 2, -10
        data.RescaleType = "HU"

    path = enhanced(series(tmp_path / "s", VALUES, edit=scale), tmp_path / "a.dcm", shuffle)
    found = load_picture(path)
    np.testing.assert_array_equal(found.values, VALUES * 2 - 10)
    np.testing.assert_allclose(found.affine, SERIES_AFFINE)
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    pydicom.dcmwrite(path, data)
    refused(path, "frame 3", "ImagePositionPatient")
