"""Write the answer of the released set into README.md, what came of the predictions, and what a
second card buys, each between its two marks.

    python tools/readme.py [--check]

With --check nothing is written; the exit status is 1 where the README differs from the rows.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.analysis import boards  # noqa: E402
from lib.analysis.capacity import scored  # noqa: E402
from lib.analysis.rows import load  # noqa: E402
from lib.report import answer  # noqa: E402
from lib.studies import study  # noqa: E402

RELEASED = ROOT / "outputs/released/h100-sxm"
SECOND = ROOT / "outputs/released/h200-sxm"
CARD = "NVIDIA H200"
SCORED = scored.path().relative_to(ROOT)


def answered() -> str:
    """The first screen of the released set as Markdown."""
    first = answer.answer(load(RELEASED), context=study.load().data["context"])
    return f"{first.markdown()}\n"


def predicted() -> str:
    """How many of the predictions registered for the card of the heading hold."""
    cells = scored.read()["cells"]
    return f"{scored.sentence([cell for cell in cells if cell['gpu'] == CARD])}\n"


def bought() -> str:
    """What a second card of the heading buys."""
    return f"{boards.in_short(load(SECOND))}\n"


BLOCKS = {
    "answer: written by tools/readme.py from outputs/released/h100-sxm": answered,
    f"predicted: written by tools/readme.py from {SCORED}": predicted,
    "bought: written by tools/readme.py from outputs/released/h200-sxm": bought,
}


def with_block(text: str, mark: str, block: str) -> str:
    """The text with a block in the place of what stands between the marks of this name."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark.partition(':')[0]} -->\n"
    before, rest = text.split(begin)
    return f"{before}{begin}{block}{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    wanted = text
    for mark, block in BLOCKS.items():
        wanted = with_block(wanted, mark, block())
    if arguments.check:
        return int(text != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
