"""What rows say, a topic a module: each has a `table`, a `figure` and a `conclusion`.

Imports `stats`, `records`, `show`, and the plain data of `hardware`, `models` and `stacks`; never
torch. Begin with `metrics` (what a number means) and `setups` (which rows belong together).
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
