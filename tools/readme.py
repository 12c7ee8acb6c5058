"""Write the answer of the released set into README.md, between its two marks.

    python tools/readme.py [--check]

With --check nothing is written; the exit status is 1 where the README differs from the rows.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.analysis.rows import load  # noqa: E402
from lib.report import answer  # noqa: E402
from lib.studies import study  # noqa: E402

RELEASED = ROOT / "outputs/released/h100-sxm"
BEGIN = "<!-- answer: written by tools/readme.py from outputs/released/h100-sxm -->\n"
END = "<!-- /answer -->\n"


def block() -> str:
    """The first screen of the released set as Markdown."""
    first = answer.answer(load(RELEASED), context=study.load().data["context"])
    return first.markdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}{block()}\n{END}{after}"
    if arguments.check:
        return int(text != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
