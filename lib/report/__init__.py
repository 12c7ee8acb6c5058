"""Documents: the report of a result set, the comparison of two, the bundle to send.

Imports `studies`, `analysis`, `show` and `records`; never torch. Begin with `document.write`.
"""
