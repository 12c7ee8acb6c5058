"""An executed notebook as an HTML fragment that can stand in any page, many times, offline.

Notebook text is not trusted: a model wrote some of it. The allow-list below and the page's content
security policy are independent of each other; either alone keeps a planted script from running.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import nh3
from bs4 import BeautifulSoup, NavigableString, Tag
from latex2mathml.converter import convert as latex_to_mathml
from nbconvert import HTMLExporter, TemplateExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from traitlets.config import Config

from lib.records import pictures

# nbconvert's own, with the code of each cell folded, and without its prompts and the boxes around
# boxes that its own style needs: `super.super()` is what they are around.
TEMPLATE = """{% extends "basic/index.html.j2" %}
{% block codecell %}{{ super.super() }}{% endblock %}
{% block input_group %}{% if cell.source.strip() %}
<details class="code"><summary>Code</summary>{{ super.super() | trim }}</details>
{% endif %}{% endblock %}
{% block in_prompt %}{% endblock %}
{% block input %}{{ cell.source | highlight_code(metadata=cell.metadata) }}{% endblock %}
{% block output_group %}{{ super.super() }}{% endblock %}
{% block output %}<div class="output">
{{ super.super() }}
</div>{% endblock %}
{% block markdowncell %}<div class="text_cell_render">
{{ cell.source | markdown2html | strip_files_prefix }}
</div>
{% endblock %}
{% block data_html %}{{ output.data["text/html"] }}{% endblock %}
{% block data_markdown %}<div class="output_markdown">
{{ output.data["text/markdown"] | markdown2html }}</div>{% endblock %}"""
STYLE = Path(__file__).parent / "templates" / "page.css"
STYLED = re.compile(r"\.highlight \.(\w+)")
MADE_BY = (Path(__file__), Path(pictures.__file__), STYLE)  # what a fragment depends on
DROPPED_TAGS = {"papermill-error-cell-tag", "remove-cell"}
NOISE = re.compile(
    r"Kernel is running over TCP without encryption|Frozen modules are being used|"
    r"PYDEVD_DISABLE_FILE_VALIDATION|frozen_modules=off|IProgress not found|notebook_tqdm|"
    r"ProfilerHandler\.cpp|"
    r"\d+%\|.*\| *\d+/\d+"
)
SHOWN_OUTPUTS = (
    "text/html",
    "text/markdown",
    "image/png",
    "image/jpeg",
    "image/svg+xml",
    "text/latex",
    "text/plain",
)
PLACEHOLDER_ALT = "No description has been provided for this image"
MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    r"|(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?![\d$])",
    re.DOTALL,
)
MATHML_TAGS = (
    "math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow ms mspace msqrt mstyle msub "
    "msubsup msup mtable mtd mtext mtr munder munderover"
)
TEXT_TAGS = (
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption "
    "figure h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q s samp small span strong sub "
    "summary sup table tbody td tfoot th thead tr u ul var"
)
ATTRIBUTES = {
    "*": {"class", "id", "title"},
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "td": {"colspan", "rowspan", "data-value"},
    "th": {"colspan", "rowspan", "data-col", "data-value", "scope"},
    "ol": {"start"},
}
HEADING = re.compile(r"<(/?)h([1-6])(?=[\s>])")
PNG = "data:image/png;base64,"
LONG = 36  # characters of a cell's text that stay on one line
NUMBER = re.compile(r"[-+−]?[\d,.]+(e[-+]?\d+)?|[-–—]|None|NaN|")
DATA_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp|svg\+xml)[;,]")


def read_notebook(path: str | Path) -> nbformat.NotebookNode:
    """The notebook as nbformat 4."""
    return nbformat.reads(Path(path).read_text(encoding="utf-8"), as_version=4)


def render_fragment(notebook: nbformat.NotebookNode, prefix: str, *, title: bool = True) -> str:
    """The notebook's body, with ids that start with `prefix`.

    Code is folded, tables stand in regions that scroll by themselves, formulas are MathML.
    `title=False` leaves out the notebook's first heading, for a page that has its own.
    """
    body = _body(notebook).encode("utf-8", "replace").decode()  # half a pair of letters is none
    soup = BeautifulSoup(clean(body), "html.parser")
    _plain_code(soup)
    for pre in soup.find_all("pre"):
        pre["tabindex"] = "0"
    if not title and (first := soup.find(re.compile(r"^h[1-6]$"))) and first.name == "h1":
        first.decompose()
    _name_headings(soup)
    _math(soup)
    _images(soup)
    _tables(soup, prefix)
    _prefix_ids(soup, prefix)
    return str(soup)


def _body(notebook: nbformat.NotebookNode) -> str:
    """What the exporter's template makes of the notebook.

    `HTMLExporter` would parse it once more, for alternative texts and focus, which are ours.
    """
    exporter, language = _exporter(), notebook.metadata.get("language_info", {})
    lexer = language.get("pygments_lexer", language.get("name"))
    exporter.register_filter(
        "highlight_code", Highlight2HTML(pygments_lexer=lexer, parent=exporter)
    )
    kinds = WidgetsDataTypeFilter(
        notebook_metadata=notebook.metadata, parent=exporter, resources={}
    )
    exporter.register_filter("filter_data_type", kinds)
    return TemplateExporter.from_notebook_node(exporter, notebook)[0]


@cache
def _exporter() -> HTMLExporter:
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=TEMPLATE,
        exclude_anchor_links=True,
        preprocessors=[_without_noise],
        config=Config(TagRemovePreprocessor={"remove_cell_tags": DROPPED_TAGS}),
    )
    # All of it goes through `clean` in the end, so that the code alone need not.
    exporter.register_filter("clean_html", lambda html: html)
    return exporter


def clean(html: str) -> str:
    """HTML reduced to text, tables and embedded images: no script, style, form or foreign image."""
    return nh3.clean(
        html,
        tags=set(TEXT_TAGS.split()),
        attributes=ATTRIBUTES,
        clean_content_tags={"script", "style", "iframe", "object", "template", "svg", "math"},
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto", "data"},
        link_rel="noopener noreferrer",
    )


def _attribute(tag: str, name: str, value: str) -> str | None:
    if tag == "img" and name == "src":
        return value if DATA_IMAGE.match(value) else None
    if name == "href" and value.strip().lower().startswith("data:"):
        return None
    return value


def _without_noise(notebook: nbformat.NotebookNode, resources: Any) -> tuple[Any, Any]:
    """For nbconvert's copy of a notebook: no progress bars, widget data and remarks of kernels."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in map(_output, cell.outputs) if out is not None]
    return notebook, resources


def _output(output: dict[str, Any]) -> dict[str, Any] | None:
    if output["output_type"] == "stream":
        text = output["text"] if isinstance(output["text"], str) else "".join(output["text"])
        lines = [x for x in text.splitlines(keepends=True) if not NOISE.search(x)]
        output["text"] = "".join(lines)
        return output if output["text"].strip() else None
    if output["output_type"] in ("display_data", "execute_result"):
        data = {k: v for k, v in output["data"].items() if k in SHOWN_OUTPUTS}
        if isinstance(data.get("text/html"), str):
            data["text/html"] = clean(data["text/html"])  # alone, so that it cannot close our tags
        output["data"] = data
        return output if data else None
    return output


def _plain_code(soup: BeautifulSoup) -> None:
    """Of the highlighter's marks only those stay that the page's style draws."""
    styled = set(STYLED.findall(STYLE.read_text(encoding="utf-8")))
    for mark in soup.select("div.highlight span"):
        if not styled.intersection(mark.get("class", ())):
            mark.unwrap()


def demoted(fragment: str, levels: int) -> str:
    """A fragment whose headings sink by `levels`, to stand below those of a page."""
    return HEADING.sub(lambda m: f"<{m[1]}h{min(6, int(m[2]) + levels)}", fragment)


def _name_headings(soup: BeautifulSoup) -> None:
    for heading in soup.find_all(re.compile(r"^h[1-6]$")):
        if not heading.get("id"):  # what JupyterLab calls it, so that links within a notebook work
            heading["id"] = heading.get_text(strip=True).replace(" ", "-")


def _math(soup: BeautifulSoup) -> None:
    """Formulas between dollars in Markdown become MathML; what does not convert stays as code."""
    for block in soup.select(".text_cell_render, .output_markdown, .output_latex"):
        for text in list(block.find_all(string=MATH)):
            if not any(parent.name in ("code", "pre") for parent in text.parents):
                text.replace_with(*_with_math(str(text)))


def _with_math(text: str) -> list[Any]:
    parts: list[Any] = []
    end = 0
    for match in MATH.finditer(text):
        parts.append(NavigableString(text[end : match.start()]))
        display = match.group(1) or match.group(2)
        formula = display or match.group(3) or match.group(4)
        element = BeautifulSoup(mathml(formula, display=bool(display)), "html.parser")
        if display and element.math:
            element.math["tabindex"] = "0"  # a wide formula scrolls by keyboard too
        parts.append(element)
        end = match.end()
    return [*parts, NavigableString(text[end:])]


def mathml(formula: str, *, display: bool = False) -> str:
    """LaTeX as MathML, or as code where it cannot be converted."""
    try:
        markup = latex_to_mathml(formula.strip(), display="block" if display else "inline")
    except Exception:  # the converter raises whatever its parser meets
        markup = ""
    tags = set(re.findall(r"</?([^\s/>]+)", markup))
    if not tags or tags - set(MATHML_TAGS.split()) or re.search(r"\s(on\w+|href|style)=", markup):
        code = BeautifulSoup("", "html.parser").new_tag("code")
        code.string = formula
        return str(code)
    return markup


def _images(soup: BeautifulSoup) -> None:
    for image in soup.find_all("img"):
        if not image.get("src"):
            note = soup.new_tag("em")
            note.string = f"[image left out: {image.get('alt') or 'not embedded'}]"
            image.replace_with(note)
            continue
        if image.get("alt", PLACEHOLDER_ALT) in ("", PLACEHOLDER_ALT):
            heading = image.find_previous(re.compile(r"^h[1-6]$"))
            where = heading.get_text(strip=True) if heading else "this notebook"
            image["alt"] = f"Figure under “{where}”; the notebook gives no description"
        image["class"] = "figure"
        if image["src"].startswith(PNG):
            image["src"] = pictures.for_page(image["src"].removeprefix(PNG))


def _tables(soup: BeautifulSoup, prefix: str) -> None:
    """Each table in a focusable region with a name of its own, its headers with a scope."""
    for number, table in enumerate(soup.find_all("table"), start=1):
        for cell in table.find_all("th"):
            if not cell.get_text(strip=True):
                cell.name = "td"
            else:
                cell["scope"] = "col" if cell.find_parent("thead") else "row"
        ours = "data" in table.get("class", ())  # written by `show.table`, not by pandas
        table["class"] = [*table["class"]] if ours else ["data", "sortable"]
        head = table.find("thead")
        if head is not None and len(head.find_all("tr")) == 1:
            for index, cell in enumerate(head.find_all(("th", "td"))):
                if cell.name == "th":
                    cell["data-col"] = str(index)
        if not ours:
            _align(table)
        region = soup.new_tag(
            "div",
            attrs={
                "class": "scroll",
                "role": "region",
                "tabindex": "0",
                "aria-label": f"{prefix}, table {number}",
            },
        )
        table.wrap(region)


def _align(table: Tag) -> None:
    """Columns that hold only numbers go to the right with their header; long text may wrap."""
    columns: dict[int, list[Tag]] = {}
    heads = {th.get("data-col"): th for th in table.find_all("th", attrs={"data-col": True})}
    for row in table.select("tbody tr"):
        for index, cell in enumerate(row.find_all(("td", "th"))):
            columns.setdefault(index, []).append(cell)
            if len(cell.get_text(strip=True)) > LONG:
                cell["class"] = "long"
    for index, cells in columns.items():
        if all(NUMBER.fullmatch(cell.get_text(strip=True)) for cell in cells):
            head = heads.get(str(index))
            for cell in [c for c in cells if c.name == "td"] + ([] if head is None else [head]):
                cell["class"] = "num"


def _prefix_ids(soup: BeautifulSoup, prefix: str) -> None:
    seen: dict[str, int] = {}
    for tag in soup.find_all(id=True):
        name = re.sub(r"[^\w-]+", "-", f"{prefix}--{tag['id']}")
        seen[name] = seen.get(name, 0) + 1
        tag["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    for tag in soup.find_all("a", href=re.compile("^#")):
        del tag["rel"]
        target = re.sub(r"[^\w-]+", "-", f"{prefix}--{tag['href'][1:]}")
        if target in seen:
            tag["href"] = f"#{target}"
        else:
            _unlink(tag)


def _unlink(tag: Tag) -> None:
    """A link that leads nowhere in this copy becomes its text."""
    tag.name = "span"
    del tag["href"]
