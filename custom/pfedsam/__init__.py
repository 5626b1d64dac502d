"""pFedSAM: personalised federated fine-tuning of the Segment Anything Model for medical image segmentation.

Everything is loaded when it is first asked for, so `import pfedsam` alone takes milliseconds.

Example:
    >>> import pfedsam
    >>> model = pfedsam.load_model("runs/mine", site="hospital_a")  # doctest: +SKIP
    >>> model.segment("scan.nii.gz").save("scan_lesion.nii.gz")  # doctest: +SKIP
"""

from __future__ import annotations

#: For type checkers and editors, which take it as true; `typing` itself would be most of the time of the import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pfedsam.api import (
        Model,
        Segmentation,
        SimulationResult,
        compare,
        evaluate,
        load_model,
        simulate,
        train_site,
    )
    from pfedsam.errors import ErrorCode, PFedSAMError
    from pfedsam.storage.site_model import SiteModel

__version__ = "0.1.0"

#: The module of each name that is loaded when it is asked for.
_HOMES = {
    **dict.fromkeys(("Model", "Segmentation", "SimulationResult"), "pfedsam.api"),
    **dict.fromkeys(("compare", "evaluate", "load_model", "simulate", "train_site"), "pfedsam.api"),
    **dict.fromkeys(("ErrorCode", "PFedSAMError"), "pfedsam.errors"),
    "SiteModel": "pfedsam.storage.site_model",
}

__all__ = [
    "ErrorCode",
    "Model",
    "PFedSAMError",
    "Segmentation",
    "SimulationResult",
    "SiteModel",
    "__version__",
    "compare",
    "evaluate",
    "load_model",
    "simulate",
    "train_site",
]


def __getattr__(name: str) -> Any:
    """Load a name of the API when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
