"""Site folders, their checks, slices, and the phantom federation."""
