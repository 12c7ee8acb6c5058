"""What a GPU or a load that was not measured would give: predictions with intervals, registered.

`model` learns from rows and predicts, `fit` is its arithmetic, `registry` writes predictions down
before anybody measures.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
