"""One sweep a notebook: primitives that a notebook calls in one line each.

Imports all of the measuring side: `hardware`, `models`, `stacks`, and `records`, into which every
sweep writes its rows at once. Begin with `latency.sweep`. `session` is what each one starts with.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
