"""Joules of calls on the GPU board: windows of calls, blocks of windows, and what checks them.

Begin with `sweep.sweep`; a window is measured in `windows.fill`.
"""
