"""The Python API: train, simulate, compare, evaluate and segment, as the commands do. `pfedsam` re-exports it.

Heavy libraries are imported by the calls that need them. NVFlare is needed by `simulate` and `compare(nvflare=True)`
only. The calls print nothing of their own; MONAI writes its bars and warnings to stderr. Progress goes to the `event`
that a caller gives, a line for each thing that one waits for.
"""

from pfedsam.api.models import Model, Segmentation, evaluate, load_model
from pfedsam.api.runs import SimulationResult, compare, planned_simulation, simulate
from pfedsam.api.training import train_site

__all__ = [
    "Model",
    "Segmentation",
    "SimulationResult",
    "compare",
    "evaluate",
    "load_model",
    "planned_simulation",
    "simulate",
    "train_site",
]
