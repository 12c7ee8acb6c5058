"""How a token is chosen, by name: "greedy", or settings with values, "temperature 0.7 top-p 0.9".

What is not named is switched off, with one exception: where a temperature is named and no top-k,
the library's own top-k of 50 is on, as in the script of arXiv 2508.16700.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

GREEDY = "greedy"
THEIR_TOP_K = 50


@dataclass(frozen=True)
class Setting:
    """A setting of `generate()`: the library's name, what it may be, whether it is of sampling."""

    name: str
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    samples: bool = True

    def value(self, text: str) -> float:
        """The value; a ValueError for what is no number between low and high."""
        number = int(text) if self.whole else float(text)
        if not self.low <= number <= self.high or number in (0, math.inf):
            raise ValueError(text)
        return number


SETTINGS = {
    "temperature": Setting("temperature"),
    "top-k": Setting("top_k", whole=True),
    "top-p": Setting("top_p", high=1.0),
    "min-p": Setting("min_p", high=1.0),
    "top-h": Setting("top_h", high=1.0),
    "typical-p": Setting("typical_p", high=1.0),
    "epsilon-cutoff": Setting("epsilon_cutoff", high=1.0),
    "eta-cutoff": Setting("eta_cutoff", high=1.0),
    "repetition-penalty": Setting("repetition_penalty", samples=False),
    "no-repeat-ngram": Setting("no_repeat_ngram_size", whole=True, samples=False),
    "beams": Setting("num_beams", low=2, whole=True, samples=False),
}
OFF = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


def options(text: str) -> dict[str, Any]:
    """What `generate()` is given for a decoding; a ValueError names what is unknown in it."""
    words = text.split()
    greedy = words[:1] == [GREEDY]
    pairs = words[1:] if greedy else words
    if not words or len(pairs) % 2:
        raise ValueError(_hint(text))
    chosen, samples = {}, False
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        if name not in SETTINGS:
            raise ValueError(_hint(text, name))
        setting = SETTINGS[name]
        try:
            chosen[setting.name] = setting.value(value)
        except ValueError:
            kind = "a whole number" if setting.whole else "a number"
            most = f" and at most {setting.high:g}" if setting.high < math.inf else ""
            least = f"of at least {setting.low:g}" if setting.low else "above 0"
            raise ValueError(
                f"decoding {text!r}: {name} {value} is not {kind} {least}{most}"
            ) from None
        samples |= setting.samples
    if greedy and samples:
        raise ValueError(f"decoding {text!r}: greedy does not sample; leave {GREEDY!r} out")
    if not samples:
        return {"do_sample": False, **chosen}
    off = OFF | ({"top_k": THEIR_TOP_K} if "temperature" in chosen else {})
    return {"do_sample": True, **off, **chosen}


def _hint(text: str, name: str = "") -> str:
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    meant = f": {name!r} may be {near[0]!r}" if near else f": {name!r} is none" if name else ""
    return (
        f"unknown decoding {text!r}{meant}; write {GREEDY!r}, or settings with a value each, such "
        f"as 'temperature 0.7 top-p 0.9'; known: {', '.join(SETTINGS)}"
    )
