"""What the commands and the Python API take where nothing is said."""

from __future__ import annotations

BUNDLE = "brain_lesion_mri"
#: Of a comparison.
STRATEGIES = ("local_only", "fedavg_lora", "fedavg_lora_ft", "feddpa", "pfedsam")
