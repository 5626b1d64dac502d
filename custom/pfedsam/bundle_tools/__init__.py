"""For people who write bundles: a new one from ours, and the checks that every bundle must pass."""
