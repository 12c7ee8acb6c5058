"""How a number, a table, a figure and a page look, here and in HTML. Nothing is computed here.

Imports `stats`, `records` and `files`; never torch. Begin with `table.Table`; `wording` says a
number with its interval in a sentence, `page` is the shell of every HTML file.
"""

from lib import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
