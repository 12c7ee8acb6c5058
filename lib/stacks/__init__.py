"""Ways to generate, behind one call. Imports `models` and `records`.

Begin with `registry.open_stack`: it returns a callable (ids, new_tokens) -> `stack.Decoded`.
`logits_check` says whether a stack computes what `generate()` computes. `stack` needs no torch.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
