"""What a bundle's own inference writes its results with, for `python -m monai.bundle run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from monai.data import NibabelWriter
from monai.utils import MetaKeys, convert_data_type


class VolumeWriter(NibabelWriter):
    """A volume of one channel as NIfTI, in its own grid and with all three axes.

    MONAI's writer leaves out axes of length 1 at the end: the label of one slice would be no volume.
    """

    def set_data_array(self, data_array: Any, *args: Any, **kwargs: Any) -> None:
        """Take the first channel of `(1, x, y, z)`."""
        self.data_obj = convert_data_type(data_array, output_type=np.ndarray)[0][0]

    def set_metadata(self, meta_dict: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> None:
        """Take the affine; nothing is resampled."""
        affine = (meta_dict or {}).get(MetaKeys.AFFINE)
        self.affine = np.eye(4) if affine is None else convert_data_type(affine, output_type=np.ndarray)[0]
