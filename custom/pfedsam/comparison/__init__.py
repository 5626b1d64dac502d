"""Strategies against each other, on the same cases with the same steps."""
