"""Measurement primitives for the deployment-cost workbook.

The measuring side (device, models, decode, latency, memory, energy) may import torch; the reading
side (records, stats, params, ape, plots, tables, report) never does, so that anyone can redo the
analysis on a laptop.
"""

__version__ = "0.1.0"
