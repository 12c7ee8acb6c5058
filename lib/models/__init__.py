"""What a model is, and where it comes from. Imports `files` and `records`.

Begin with `card` (what an architecture implies, nothing allocated) and `load` (a net on a device).
`card`, `entries` and `formats` are plain data without torch, which the reading side uses too.
A card is counted by `count` from one decode step on shapes (`decode_step`, `dry_run`) and from the
configuration (`config_fields`, `context_limit`); what lies in
the files of a checkpoint is told by `checkpoint_files`, how it is quantised by `quantised`, what a
GGUF file says beyond its weights by `gguf_fields`, what the values of a loaded net say by
`net_values`.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
