"""arXiv:2605.30571, the memory floor of batch-1 decoding: the rules of its audit."""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
