"""SePiCo on a cluster of Ray workers."""

import gc

import sepico  # noqa: F401 - which keeps torch's compiler from being imported with torch

# Importing Ray and torch makes a million objects that stay. At Python's own threshold, 700, looking
# through them again and again is a quarter of every process's start.
gc.set_threshold(50_000)
