"""What the file of a study in params/published/ holds. Printed values are text, as printed."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Tolerance = Literal["whole", "count", "memory", "time", "effect"]  # of the verdicts


class Column(TypedDict):
    """`unit` as written; `meant` is the unit of the numbers where the two differ.

    `metric` is one of `studies.forms`; `form` what is shown of it: its difference to the
    study's model, the saving of the study's model, or the change from the context `before`.
    """

    unit: str
    meant: NotRequired[str]
    metric: NotRequired[str]
    form: NotRequired[Literal["difference", "saving", "change"]]
    context: NotRequired[int]
    before: NotRequired[int]
    tolerance: NotRequired[Tolerance]


class PrintedTable(TypedDict):
    """A table of numbers; null is a cell, or a context, that the study leaves out.

    `rows_are` and `columns_are` say what the labels name, `metric` what all cells hold. A table of
    an ablation has an arm a row; `arms` are their values by label, `reference` the label of the one
    that changes are against, `more_rows` whether arms of ours are added, `row_reasons` why a row
    cannot be had. `main` tables come first in a report; `topic` names what the abstract sums up;
    `read` says how the table was read, where not in the paper itself.
    """

    title: str
    where: str
    read: NotRequired[str]
    note: NotRequired[str]
    context: NotRequired[int | None]
    columns: dict[str, Column]
    rows: dict[str, list[str | None]]
    row_notes: NotRequired[dict[str, str]]
    rows_are: NotRequired[Literal["model", "context", "arm", "gpu"]]
    columns_are: NotRequired[Literal["model", "context", "gpu"]]
    metric: NotRequired[str]
    tolerance: NotRequired[Tolerance]
    ablation: NotRequired[Literal["decoding", "context", "precision", "stack"]]
    arms: NotRequired[dict[str, str]]
    reference: NotRequired[str]
    more_rows: NotRequired[bool]
    row_reasons: NotRequired[dict[str, str]]
    main: NotRequired[bool]
    topic: NotRequired[str]


class GovernanceTable(TypedDict):
    """A table of words about licences and policies, a row a model."""

    number: int
    title: str
    where: str
    columns: list[str]
    rows: dict[str, list[str]]


class Test(TypedDict):
    """How a claim is tested: names of `studies.forms`, and a key of the verdicts' tolerances.

    `corrected` is the metric by a corrected definition, `bound` that on a stack that the device
    bounds, where it is another one. `over` says what the ratio is taken over, such as two contexts.
    """

    form: Literal["value", "ratio", "gain", "saving", "difference", "steps"]
    metric: str
    tolerance: Tolerance
    corrected: NotRequired[str]
    bound: NotRequired[str]
    over: NotRequired[dict[str, list[int | str]]]


class Cells(TypedDict):
    """What a claim's number follows from: printed cells of its model and of the study's, or counts.

    `column` is of a `table`, `inverse` where its reciprocal is meant; a gain or saving is over the
    column `before` of the same row, else over the study's model. `counted` is a name of Counts, as
    a share `of` another where that is given. `factor` makes the claim's unit.
    """

    form: Literal["value", "ratio", "gain", "saving", "order"]
    table: NotRequired[int]
    column: NotRequired[str]
    row: NotRequired[str]
    before: NotRequired[str]
    inverse: NotRequired[bool]
    counted: NotRequired[str]
    of: NotRequired[str]
    factor: NotRequired[float]


class Claim(TypedDict):
    """A number, a range of two or, where `value` is null, an order that the text claims.

    Without a `test` it is tested by a rule of its study, by the claim's name. It cannot be tested
    where there is a `reason`, or where its `gpu` has one. `low` and `high` are the ends of the
    study's interval, over so many fresh `sessions`.
    """

    where: str
    text: str
    value: str | list[str] | None
    unit: str
    meant: NotRequired[str]
    direction: NotRequired[Literal["higher", "lower"]]
    model: NotRequired[str]
    models: NotRequired[list[str]]
    test: NotRequired[Test]
    cells: NotRequired[Cells]
    gpu: NotRequired[str]
    reason: NotRequired[str]
    low: NotRequired[str]
    high: NotRequired[str]
    interval: NotRequired[str]
    sessions: NotRequired[int]


class Counts(TypedDict):
    """What the model card counts for an architecture."""

    total_params: int
    active_params: int
    lookup_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    vocab_size: int


class Source(TypedDict):
    """Something that the audit takes from elsewhere."""

    text: str
    url: str
    dated: str
    bytes_per_s: NotRequired[float]
    runs: NotRequired[int]


class Reading(TypedDict):
    """A finding that was read in the study's scripts and files, not computed, and where."""

    topic: str
    severity: Literal["error", "caution", "note"]
    where: str
    printed: str
    follows: str
    source: str
    claims: NotRequired[list[str]]


class Fact(TypedDict):
    """A number or word of a released CSV, or how many of `of` rows agree in two columns."""

    value: float | str
    file: str
    column: str
    where: NotRequired[dict[str, Any]]
    same_as: NotRequired[str]
    of: NotRequired[int]


class Card(TypedDict):
    """A card of the study by its name in params/gpus.yaml, and why it cannot be measured here."""

    name: str
    reason: NotRequired[str]


class StudyFile(TypedDict):
    """A study: its setup, what it prints and claims, and what is needed to check it.

    `rules` names the folder in lib/studies/ whose `rules` module says what the data cannot.
    """

    source: str
    title: str
    html_title: NotRequired[str]
    authors: NotRequired[list[str]]
    submitted: NotRequired[str]
    url: str
    rules: NotRequired[str]
    gpu: str
    stack: str
    dtype: str
    attention: NotRequired[str]
    batch: NotRequired[int]
    context: int
    new_tokens: int
    contexts_measured: list[int]
    ablation_model: str
    gpus: NotRequired[dict[str, Card]]
    protocol: NotRequired[dict[str, str]]
    models: dict[str, list[str]]
    tables: dict[int, PrintedTable]
    governance: NotRequired[GovernanceTable]
    claims: NotRequired[dict[str, Claim]]
    counted: NotRequired[dict[str, Counts]]
    sources: NotRequired[dict[str, Source]]
    read: NotRequired[dict[str, Reading]]
    does_well: NotRequired[list[str]]
    released: NotRequired[dict[str, Fact]]
