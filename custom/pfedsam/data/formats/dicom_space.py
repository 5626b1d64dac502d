"""Where the frames of a DICOM volume lie: the affine that all of them agree on.

A gantry that is tilted gives a sheared one. Numbers are compared, never their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.formats.dicom_file import wrong
from pfedsam.data.formats.dicom_frames import Frame

#: How far a voxel may lie from where the volume's affine says: so many voxels, or so many millimetres if that is more
#: (positions are often rounded to a tenth), but never more than a share of a voxel.
TOLERANCE, TOLERANCE_MM, LARGEST_TOLERANCE = 0.05, 0.1, 0.25
#: No gantry tilts so far, in degrees.
LARGEST_TILT = 45.0
#: Positions that are no farther from a line, in millimetres, are not rounded.
_EXACT = 1e-4
#: A tilt is told from this angle on, in degrees.
_TOLD_TILT = 0.1
_ONE = "Give each slice once: one time point, echo or segment."


def affine_of(path: Path, frames: Sequence[Frame]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Voxel indices to millimetres right, anterior, superior `(4, 4)`, and what to know of it.

    Args:
        path: of the volume, for messages.
        frames: in their order.

    Raises:
        PFedSAMError: E05 naming the frame that does not lie where the others say, or slices that are missing or double.
    """
    first = frames[0]
    down, across = first.spacing
    normal = np.cross(first.row, first.column)
    step, origin = normal * first.thickness, first.position
    notes: tuple[str, ...] = ()
    if len(frames) > 1:
        positions = np.stack([frame.position for frame in frames])
        _check_steps(path, frames, positions @ normal)
        step, origin = _line(positions)
        notes = _tilt(path, step, normal)
    directions = np.stack([first.row * across, first.column * down, step], axis=1)
    for number, frame in enumerate(frames):
        _check_place(path, frame, first, origin + number * step, directions)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions, origin
    # DICOM's axes point left and posterior, NIfTI's right and anterior
    affine[:2] *= -1
    return affine, notes


def _line(positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The step and the origin of evenly spaced positions: of the first and the last, unless all are rounded."""
    numbers = np.arange(len(positions))
    step, origin = (positions[-1] - positions[0]) / (len(positions) - 1), positions[0]
    if _EXACT < np.abs(positions - origin - numbers[:, None] * step).max() < 2 * TOLERANCE_MM:
        step, origin = np.polyfit(numbers, positions, 1)
    return step, origin


def _check_steps(path: Path, frames: Sequence[Frame], along: NDArray[np.float64]) -> None:
    """Whether slices follow each other evenly along the normal."""
    steps = np.diff(along)
    step = float(np.median(steps))
    allowed = max(TOLERANCE * step, min(2 * TOLERANCE_MM, LARGEST_TOLERANCE * step))
    double = np.flatnonzero(steps <= min(allowed, step / 2))
    if step <= 0 or len(double):
        a, b = (frames[(double[0] if len(double) else 0) + n].name for n in (0, 1))
        raise wrong(f"{path}: slices are missing or double: {a} and {b} lie at the same position", _ONE)
    uneven = np.flatnonzero(np.abs(steps - step) > allowed)
    if len(uneven):
        at = int(uneven[0])
        raise wrong(
            f"{path}: slices are missing or double between slices {at + 1} and {at + 2} ({frames[at].name} and "
            f"{frames[at + 1].name} are {steps[at]:.2f} mm apart, expected {step:.2f} mm)",
        )


def _check_place(
    path: Path, frame: Frame, first: Frame, expected: NDArray[np.float64], directions: NDArray[np.float64]
) -> None:
    """Whether the corners of a frame lie where the affine says."""
    turned = frame.corners - first.corners
    shifted = frame.position - expected
    inside = "ImageOrientationPatient" if np.allclose(frame.spacing, first.spacing, rtol=1e-3) else "PixelSpacing"
    for what, distance in (
        (inside, turned),
        ("ImagePositionPatient", shifted[None]),
    ):
        voxels = np.abs(np.linalg.solve(directions, distance.T)).T
        sizes = np.linalg.norm(directions, axis=0)
        if (voxels > np.clip(TOLERANCE_MM / sizes, TOLERANCE, LARGEST_TOLERANCE)).any():
            far = float(np.linalg.norm(distance, axis=1).max())
            raise wrong(f"{path}: {what} of {frame.name} is {far:.2f} mm off what the other slices say")


def _tilt(path: Path, step: NDArray[np.float64], normal: NDArray[np.float64]) -> tuple[str, ...]:
    cosine = float(step @ normal / (np.linalg.norm(step) * np.linalg.norm(normal)))
    angle = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if angle > LARGEST_TILT:
        raise wrong(f"{path}: slices walk sideways, {angle:.0f} degrees off their normal, which is no tilted gantry")
    return (f"the gantry is tilted by {angle:.1f} degrees: its affine is sheared",) if angle > _TOLD_TILT else ()
