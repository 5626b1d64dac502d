"""MONAI Label's side: what runs in its Python environment. Imports nothing of pfedsam, but what lies beside it."""
