"""Predictions of cards that were not measured, registered first and scored afterwards.

`registry` reads what was registered, `score` sets it against rows, `scored` shows that, and
`predicted` makes options of the planner of it.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
