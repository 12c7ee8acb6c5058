"""Ways to generate, behind one call. Imports `models` and `records`.

Begin with `registry.open_stack`: it returns a callable (ids, new_tokens) -> `stack.Decoded`.
`logits_check` says whether a stack computes what `generate()` computes. `stack` needs no torch.
"""
