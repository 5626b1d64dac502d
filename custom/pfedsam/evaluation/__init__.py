"""Evaluation of a site's models, tables and pictures."""
