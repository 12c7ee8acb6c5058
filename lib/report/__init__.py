"""Documents: the report of a result set, the comparison of two, the bundle to send.

Imports `studies`, `analysis`, `show` and `records`; never torch. Begin with `document.write`.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
