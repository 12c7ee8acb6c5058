"""What the serving rows say: `reading` derives, `attribution` fits energy, the others show."""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
