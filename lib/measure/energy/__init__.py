"""Joules of calls on the GPU board: windows of calls, blocks of windows, and what checks them.

Begin with `sweep.sweep`; a window is measured in `windows.fill`.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
