"""What an executed notebook in a report repeats of the report itself: a link takes its place.

A summary's tables and figures are those of the report, from the same rows by the same code. Where
every word and number is the same the page carries it once; the notebook's own page is whole.
"""

from __future__ import annotations

import re
from html import unescape

from markupsafe import Markup

NOTEBOOKS = '<h2 id="notebooks">'
TABLE = re.compile(r'<figure class="table" id="([^"]+)">.*?</figure>', re.DOTALL)
PICTURE = re.compile(r'<figure class="picture" id="([^"]+)"><svg\b[^>]* aria-label="([^"]+)"')
IMAGE = re.compile(r"""<img\b[^>]*? alt=("[^"]*"|'[^']*')[^>]*>""")
TAG = re.compile(r"<[^>]*>")
ABOVE = Markup('<p class="note">As above: <a href="#{}">{}</a>.</p>')


def linked(report: str) -> str:
    """The report with each table and picture of its notebooks that stands above them as a link."""
    above, heading, notebooks = report.partition(NOTEBOOKS)
    tables = {_words(table[0]): table[1] for table in TABLE.finditer(above)}
    pictures = {unescape(text): name for name, text in PICTURE.findall(above)}

    def table(again: re.Match[str]) -> str:
        name = tables.get(_words(again[0]))
        title = unescape(TAG.sub("", again[0].partition("</b>")[0])).removesuffix(".")
        return str(ABOVE.format(name, title)) if name else again[0]

    def picture(again: re.Match[str]) -> str:
        text = unescape(again[1][1:-1])
        name, title = pictures.get(text), text.partition(";")[0]
        return str(ABOVE.format(name, title)) if name else again[0]

    return above + heading + IMAGE.sub(picture, TABLE.sub(table, notebooks))


def _words(html: str) -> str:
    """What a reader sees of it, without the spaces between."""
    return "".join(unescape(TAG.sub("", html)).split())
