"""What the options of a command line take: numbers with their unit, yes and no, and the variables
of make; what is wrong is said in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from lib import files
from lib.files import unknown
from lib.run.console import say
from lib.run.profiles import SLICES

REBUILT = ("FROM", "OUT", "GPU_HOUR_USD", "KWH_USD", "STUDY", "PYTHON")
OWN = (
    *("PROFILE", "MODELS", "NOTEBOOKS", "WEIGHTS", "STACK", "DTYPE", "DEVICES", "SERVER", "ALSO"),
    *("FROM", "OUT", "A", "B", "GPU_HOUR_USD", "KWH_USD", "FORCE", "WAIT", "TIMEOUT", "JOBS"),
    *("MODEL", "GPU", "GPU_GB", "BANDWIDTH_GB_S", "CONTEXT", "USERS", "TTFT_MS", "ITL_MS"),
    *("STUDY", "CSV", "FORMAT", "ENGINE", "IMAGE", "ROUNDS", "CALLS", "NEW_TOKENS", "EFFECT"),
    *("PYTHON", "ARGS"),
)
# Those of a verb that are no option of its own name.
ALSO = {
    "bundle": ("PROFILE", "ARGS"),
    **dict.fromkeys(("jobs", "versus", "fit", "audit"), ("ARGS",)),
}


def refuse_variables(given: str, args: argparse.Namespace) -> None:
    """Raise for a variable on make's command line that the verb of the arguments would not heed.

    Other names are for the processes that it starts, such as HF_HOME.
    """
    names = {"FROM" if n in ("source", "sources") else n.upper() for n in vars(args)}
    names |= {"PYTHON", *ALSO.get(args.verb, ())}
    rebuilds = args.verb == "report" and args.source
    takes = REBUILT if rebuilds else tuple(name for name in OWN if name in names)
    what = f"make {args.verb}{' FROM=' if rebuilds else ''}"
    for name in sorted({*given.split()} - {*takes}):
        if name in OWN or any(files.alike(name, x) for x in takes):
            raise unknown(f"variable of {what}:", name, takes)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does, and takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple:
        options, more = super().parse_known_args(args, namespace)
        if more:  # said by the verb, which knows its own options
            self.error(f"unrecognized arguments: {' '.join(more)}")
        return options, more

    def error(self, message: str) -> None:
        message = message.replace("\n", " ")
        if match := re.match(r"unrecognized arguments: (-\S+)", message):
            options = [x for x in self._option_string_actions if x.startswith("--")]
            message = str(unknown("option", match[1].partition("=")[0], options))
        say(f"error: {message} (`{self.prog} --help` lists all)")
        raise SystemExit(2)


def number(what: str, example: float, most: float, *, whole: bool = False) -> Callable:
    """The type of an option that takes a number above 0, and what it counts."""

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = 0
        if not 0 < value <= most:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r:.60} is not {kind} of {what} above 0 and up to {most:,.0f}, "
                f"such as {example}"
            )
        return value

    return parse


def boolean(text: str) -> bool:
    """Yes or no, as people write it."""
    word = text.strip().lower()
    if word in ("1", "y", "yes", "t", "true", "on"):
        return True
    if word in ("0", "n", "no", "f", "false", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r:.60} is neither yes nor no; write 1 or 0")


FLAG = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "YES"}
GIB = 2**30 / 1e9  # in GB
_GB = number("GB of 10^9 bytes", 80, 1e6)


def gigabytes(text: str) -> float:
    """GB of 10^9 bytes, as people write them: 24, 24GB, 24 gb, 22.4GiB."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(g|gb|gib)\s*", text, re.IGNORECASE)
    if match is None:
        return _GB(text)
    value = _GB(match[1]) * (GIB if match[2].lower() == "gib" else 1)
    return round(value, 3) or _GB(text)  # raises: less than a megabyte is none


BANDWIDTH = number("GB/s", 3350, 1e9)
JOBS = number("jobs at once", 2, 1024, whole=True)
USERS = number("users at once", 20, 1e9, whole=True)
GPUS = number("GPUs that share a model", 2, 1024, whole=True)
PRICE = number("USD", 2.5, 1e9)
MS = number("milliseconds", 500, 1e9)
SECONDS = number("seconds", 3600, 1e7)
CALLS = number("timed calls", 8, 1e6, whole=True)
ROUNDS = number("rounds of four blocks", 3, 1000, whole=True)
PERCENT = number("per cent", 5, 1000)
TOKENS = number("tokens", 2048, 1e9, whole=True)


def of_run(args: argparse.Namespace) -> list[str]:
    """What to run and how, as the options of another process of this command line."""
    names = ("profile", *SLICES, "server", "also", "timeout")
    values = ((name, getattr(args, name)) for name in names)
    flags = [f"--{name}" for name in ("force", "wait") if getattr(args, name)]
    return [*(f"--{name}={value}" for name, value in values if value), *flags]


def token_counts(text: str) -> tuple[int, ...]:
    """Contexts of a command line: 2048,8192."""
    return tuple(TOKENS(item) for item in files.split(text)) or (TOKENS(text),)
