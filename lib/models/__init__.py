"""What a model is, and where it comes from. Imports `files` and `records`.

Begin with `card` (what an architecture implies, nothing allocated) and `load` (a net on a device).
`card`, `entries` and `formats` are plain data without torch, which the reading side uses too.
"""
