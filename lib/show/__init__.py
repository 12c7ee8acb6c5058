"""How a number, a table, a figure and a page look, here and in HTML. Nothing is computed here.

Imports `stats`, `records` and `files`; never torch. Begin with `table.Table`; `wording` says a
number with its interval in a sentence, `page` is the shell of every HTML file.
"""

import sys

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)

# jsonschema builds the grammars of all internet addresses when it is imported, which takes a
# second; no schema of notebooks uses them, and it does without where the package is not there.
sys.modules.setdefault("rfc3987_syntax", None)
