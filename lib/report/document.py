"""One self-contained HTML report from run.json files, records and executed notebooks.

Nothing is measured here. The same inputs give the same bytes: no time of writing goes in. The page
loads nothing from anywhere, and its content security policy allows one script, by its hash.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from markupsafe import Markup

from lib.analysis import bounds, cost, host_bound, machine, predictions
from lib.analysis.batch import figures, tables
from lib.analysis.memory.figures import PROTOCOLS, memory_ledger
from lib.analysis.rows import Rows
from lib.analysis.setups import RANDOM_NOTE
from lib.files import write_text
from lib.records.jobs import ACROSS, BEFORE_MODELS, Job, find, readable, slug
from lib.records.kinds import model_order
from lib.records.record import Record, environments
from lib.records.store import merge, precedence, refuse_links
from lib.report import provenance, record_list, sections
from lib.report.abstract import findings
from lib.show import figure
from lib.show.notebook_html import demoted, read_notebook, render_fragment
from lib.show.page import data_link, entry, shell
from lib.studies import paper_tables, section
from lib.studies.grids import paper_grid
from lib.studies.schema import StudyFile
from lib.studies.study import Published, load, paper_name

SECTION = re.compile(r'<h2[^>]* id="([^"]+)"[^>]*>(.*?)</h2>', re.DOTALL)
TITLE = "What it costs to deploy an open-weight language model"


def write(
    source_dir: str | Path,
    out_dir: str | Path | None = None,
    prices: cost.Prices | None = None,
    study: Published | None = None,
    called: str | None = None,
) -> Path:
    """Write report.html, tables/*.csv and each job's notebook.html; return the report's path.

    `source_dir` holds jobs (run.json, records.jsonl, notebook.ipynb) and is only read when
    `out_dir` is another folder. Costs are shown where `prices` are given; `study` is the published
    one beside the rows, by default this workbook's. `called` is what commands to run a job again
    call the results, if not by their path.
    """
    source = Path(source_dir)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder of results; run `make report` first")
    out = Path(out_dir) if out_dir is not None else source
    jobs = find(source, called)
    if not jobs:
        raise FileNotFoundError(f"no run.json below {source}; run `make report` first")
    refuse_links(out)
    out.mkdir(parents=True, exist_ok=True)
    fragments = {job.id: _fragment(job) for job in jobs if job.notebook_path}
    pages = {job.id: _page(job, out, fragments[job.id]) for job in jobs if job.notebook_path}
    path = out / "report.html"
    write_text(path, render(jobs, source, out, pages, fragments, prices, study or load()))
    return path


def write_notebook_page(job_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write one job's notebook.html into its folder (or `out_dir`) and return the path.

    `job_dir` is `<results>/<model>/<weights>-<stack>/<notebook>`; the results folder is the
    nearest one above that holds all its jobs.
    """
    folder = Path(job_dir).resolve()
    root = _results_root(folder)
    job = next((j for j in find(root) if j.folder.resolve() == folder), None)
    if job is None or job.notebook_path is None:
        raise FileNotFoundError(f"{folder} holds no run.json with an executed notebook")
    return _page(job, Path(out_dir) if out_dir is not None else root, _fragment(job))


def _results_root(folder: Path) -> Path:
    """Two levels above a cross-model notebook without setup, three above any other."""
    return folder.parents[1] if folder.parent.name == ACROSS else folder.parents[2]


def _fragment(job: Job) -> str:
    """A job's notebook as HTML, under headings of its own page."""
    return render_fragment(read_notebook(job.notebook_path), job.id, title=False)


def _page(job: Job, out: Path, fragment: str) -> Path:
    """Write a notebook as its own page below `out`; returns its path."""
    target = out / job.path / "notebook.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    up = "/".join([".."] * len(job.parts))
    body = shell().get_template("notebook.html")
    title = f"{job.title} · {job.model}"
    text = body.render(
        title=title,
        kicker=job.setup or job.profile,
        subtitle="",
        footer="",
        demo=provenance.is_demo(job.records),
        job=job,
        fragment=Markup(fragment),
        report_href=f"{up}/report.html",
        toc=[entry(job.id, title, _headings(fragment))],
        ipynb_href=quote(Path(os.path.relpath(job.notebook_path, target.parent)).as_posix()),
    )
    write_text(target, text)
    return target


def _headings(fragment: str) -> list[SimpleNamespace]:
    """The contents of a notebook's page: its second-level headings."""
    return [entry(name, Markup(text).striptags()) for name, text in SECTION.findall(fragment)]


def render(
    jobs: Sequence[Job],
    source: Path,
    out: Path,
    pages: dict[str, Path],
    fragments: dict[str, str],
    prices: cost.Prices | None,
    study: Published,
) -> str:
    """The report as text; writes the CSVs that it embeds."""
    rows = Rows(merge([r for job in _by_end(jobs) for r in job.records]))
    published = study.data
    paper = paper_tables.paper_tables(rows, published)
    bound = bounds.utilisation(rows)
    beside = [t for t in (bound, machine.table(rows), predictions.table(rows)) if t.rows]
    beside += tables.tables(rows)
    batch = figures.section(rows)
    ledgers, kernels = sections.memory_ledgers(rows, published), host_bound.kernel_tables(rows)
    generic = sections.generic_tables(rows)
    csvs = [
        *paper_tables.write_csvs(paper, out),
        *(table.write_csv(out) for table in (*generic, *beside, *ledgers, *kernels)),
    ]
    replicated = section.part(rows, study, out)
    generic += [*host_bound.tables(rows), *kernels]
    priced = cost.table(rows, prices) if prices and prices.given else None
    (out / "tables" / "money.csv").unlink(missing_ok=True)  # of other prices
    csvs += [priced.write_csv(out)] if priced else []
    context = _paper_caption(rows, published, jobs) if paper else []
    first = [t for t in paper if t.spec.get("main")]
    failures = [job for job in jobs if job.status != "ok"]
    demo = provenance.is_demo(rows)
    groups = _groups(jobs, pages, fragments, out)
    ended = max((str(job.run.get("end") or "") for job in jobs), default="")
    return (
        shell()
        .get_template("report.html")
        .render(
            title=TITLE,
            kicker=f"Deployment workbook · profile {source.name}",
            subtitle=_subtitle(rows, ended),
            demo=demo,
            cautions=context or _cautions(rows),
            findings=[
                *findings(rows, published, paper),
                *(replicated.findings if replicated else ()),
            ],
            replicated=replicated,
            counts=provenance.counts(jobs, rows),
            provenance=provenance.provenance(jobs),
            paper=published,
            paper_main=[paper_grid(t, context) for t in first],
            paper_numbers=section.numbers(first).capitalize() if first else "",
            paper_more=[paper_grid(t, context) for t in paper if t not in first],
            bound=bound,
            bound_figure=bound.rows and figure.html(bounds.figure(rows), rows, ["latency"]),
            batch=batch,
            generic=generic,
            priced=priced,
            ledgers=ledgers,
            ledger_figures=_ledger_figures(rows),
            groups=groups,
            failures=failures,
            arm_errors=provenance.arm_errors(rows),
            warnings=provenance.warnings_table(rows),
            costs=provenance.table(jobs),
            downloads=[(p.name, data_link(p)) for p in (replicated.files if replicated else [])]
            + [(p.name, data_link(p)) for p in csvs],
            files=_file_links(jobs, pages, out),
            records=record_list.table(rows, _by_end(jobs), out),
            toc=_contents(
                groups,
                bool(paper),
                bool(replicated and replicated.own),
                bool(bound.rows),
                bool(ledgers),
                bool(batch),
            ),
            footer=f"Made from {len(jobs)} jobs; the last one ended {readable(ended) or '?'}.",
        )
    )


def _ledger_figures(rows: Sequence[Record]) -> list[Markup]:
    """The stacked ledger of each protocol that has rows."""
    kinds = [k for k in PROTOCOLS if any(r.kind == k and not r.error for r in rows)]
    return [figure.html(memory_ledger(rows, kind=kind), rows, [kind]) for kind in kinds]


def _by_end(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in the order in which their rows replace each other: finished ones win, then later."""
    return sorted(jobs, key=lambda job: precedence(job.run))


def _paper_caption(rows: Sequence[Record], published: StudyFile, jobs: Sequence[Job]) -> list[str]:
    """What holds for every number beside the paper's: card, weights, and what was interrupted."""
    mine = [r for r in rows if paper_name(r.key.get("model"), published)]
    envs = environments(rows)
    gpus = sorted({str(envs.get(r.env_id or "", {}).get("gpu") or "a CPU") for r in mine})
    where = " and ".join(gpus)
    text = f"Measured on {where}."
    if gpus != [published["gpu"]]:
        text = (
            f"Measured on {where}; the paper used {published['gpu']}, so times and energy "
            "differ by hardware, memory need not."
        )
    cut = [j for j in jobs if j.status == "interrupted" and paper_name(j.model, published)]
    names = ", ".join(f"{job.model} ({job.notebook})" for job in cut)
    interrupted = [f"Interrupted, so that cells may be missing: {names}."] if cut else []
    return [text, *_cautions(mine), *interrupted]


def _cautions(rows: Sequence[Record]) -> list[str]:
    """What holds for the rows' numbers, whatever they are compared with."""
    random = any(r.key.get("weights") == "random" for r in rows)
    return [RANDOM_NOTE[:1].upper() + RANDOM_NOTE[1:] + "."] if random else []


def _subtitle(rows: Sequence[Record], ended: str) -> str:
    studied = {str(r.key["model"]) for r in rows if r.key.get("model") and r.kind != "energy-real"}
    models = sorted(studied, key=model_order)  # without the small one that checks weight values
    gpus = sorted({str(env.get("gpu") or "CPU") for env in environments(rows).values()})
    parts = [", ".join(models), " and ".join(gpus), readable(ended)[:10]]
    return " · ".join(filter(None, parts))


def _groups(
    jobs: Sequence[Job], pages: dict[str, Path], fragments: dict[str, str], out: Path
) -> list[SimpleNamespace]:
    """Sections: the machine first, then the notebooks across models, then each model's."""
    by_folder: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda j: (j.notebook not in BEFORE_MODELS, j.parts[0] != ACROSS)):
        folder = job.path if job.notebook in BEFORE_MODELS else job.parts[0]
        by_folder.setdefault(folder, []).append(job)
    groups, names = [], Counter()
    for folder, members in by_folder.items():
        across = {
            ACROSS: ("summary", "Summary across models"),
            f"{ACROSS}/machine": ("machine", "The machine"),
        }
        name, title = across.get(folder, (f"model-{slug(folder)}", members[0].model))
        names[name] += 1
        name += f"-{names[name]}" if names[name] > 1 else ""
        parts = [
            _section(job, pages.get(job.id), demoted(fragments.get(job.id, ""), 2), out)
            for job in members
        ]
        groups.append(SimpleNamespace(id=name, title=title, jobs=parts))
    return groups


def _section(job: Job, page: Path | None, fragment: str, out: Path) -> SimpleNamespace:
    return SimpleNamespace(
        id=job.id,
        title=job.title,
        status=job.status,
        setup=job.setup,
        end=job.end,
        rerun=job.rerun,
        stale=job.stale,
        fragment=Markup(fragment),
        earlier=", ".join(readable(run["end"]) for run in job.earlier),
        page=_href(page, out) if page else "",
    )


def _href(path: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(path, out)).as_posix())


def _file_links(
    jobs: Sequence[Job], pages: dict[str, Path], out: Path
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each job with files its title, and each file's name and link."""
    items = []
    for job in jobs:
        beside = (job.folder / "records.jsonl", job.folder / "run.json")
        paths = [p for p in (pages.get(job.id), job.notebook_path, *beside) if p and p.exists()]
        if paths:
            items.append((f"{job.model}, {job.title}", [(p.name, _href(p, out)) for p in paths]))
    return items


def _contents(
    groups: Sequence[SimpleNamespace],
    paper: bool,
    own: bool,
    bound: bool,
    ledgers: bool,
    batch: bool,
) -> list[SimpleNamespace]:
    entries = [entry("abstract", "Abstract"), entry("where", "What was measured where")]
    if own:
        more = (("ladder", "The ratio ladder"), ("changes", "If you measure it right"))
        entries[1:1] = [entry(*item) for item in more]
    entries.append(entry("tables", "The paper's tables" if paper else "Results"))
    if bound:
        entries.append(entry("bound", "Against the bound"))
    if batch:
        entries.append(entry("batch", "Batch"))
    if paper:
        entries.append(entry("claims", "The paper's claims"))
        entries.append(entry("more-tables", "Other tables"))
    if ledgers:
        entries.append(entry("memory-ledger", "Memory ledger"))
    entries += [entry(g.id, g.title, [entry(j.id, j.title) for j in g.jobs]) for g in groups]
    last = (("failures", "Failures"), ("methods", "Methods"), ("data", "Data"))
    return [*entries, *(entry(*item) for item in last)]
