"""From a profile to run.json: what there is to run, one job, the loop over jobs.

Imports `records`, `models`, `hardware`, `stacks` and `files`. Begin with `loop.run`; `job.run_job`
is one notebook, `plan` is all of them, `kernel` the process in which one runs. `groups` is what
stays together on one GPU, `several` runs that on the GPUs of this host, `elsewhere` on a cluster.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
