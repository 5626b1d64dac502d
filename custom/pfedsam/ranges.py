"""Ends of ranges that settings, strategies, jobs and commands share: what lies outside is a slip of the pen."""

from __future__ import annotations

LARGEST_SEED = 2**32 - 1
MOST_ROUNDS = 10_000
#: Of one phase.
MOST_EPOCHS = 1000
MOST_SITES = 1000
#: Of a site.
MOST_CASES = 100_000
#: Runs at a time on one machine.
MOST_WORKERS = 256
#: What the server may wait for, 30 days.
MOST_SECONDS = 30 * 24 * 3600
