"""Where the bytes of a call go: peaks, what lives at the peak, and what shapes alone predict.

Begin with `sweep.sweep`; `forecast` predicts a peak before it is measured.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
