"""What the study of arXiv 2508.16700 adds: rules that its file in params/published/ cannot say."""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
