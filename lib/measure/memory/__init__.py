"""Where the bytes of a call go: peaks, what lives at the peak, and what shapes alone predict.

Begin with `sweep.sweep`; `forecast` predicts a peak before it is measured.
"""
