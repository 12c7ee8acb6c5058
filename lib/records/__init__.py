"""What was measured, and where it lies. Imports `files` alone; never torch.

A `record.Record` is one arm of one measurement. Begin there; then `store` (rows in files), `jobs`
(the folders that runs wrote) and `slices` (how runs add up). `kinds` lists what rows can say.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
