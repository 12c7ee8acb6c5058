"""Servers under load: what is sent and when, a thin client, the steady window, and its joules.

`client` runs in a process of its own and keeps raw stamps; everything else that is said of a
request is derived when its row is read. Nothing here imports torch.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
