"""Replicating a published study: its claims, its tables, its own consistency, from data.

A study is a file of params/published/; what its data cannot say is in a folder of its own here.
Imports `analysis`, `show`, `records`, and plain data of the measuring side; never torch. Begin with
`study` (what was published) and `claims` (what became of it).
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
