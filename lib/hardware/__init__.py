"""The one seam to the machine: clock, memory, board, and what their readings mean.

Imports `files` and `stats`; of the modules here only `device` and `live_tensors` need torch. Begin
with `device.time_call`, the line that takes a time. No module may be called like one of Python's
own, since `power_sampler` runs as a script from this folder.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
