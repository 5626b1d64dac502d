"""What the commands and the Python API take where nothing is said."""

from __future__ import annotations

BUNDLE = "brain_lesion_mri"
#: A strategy, and the packaged job of the same name.
STRATEGY = "pfedsam_chosen"
#: Of a comparison.
STRATEGIES = ("local_only", "fedavg_lora", "fedavg_lora_ft", "feddpa", "pfedsam", STRATEGY)
