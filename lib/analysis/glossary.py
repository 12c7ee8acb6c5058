"""The words of the reports, each once: the table of definitions, and what opens on a word.

What the catalogue of metrics says of a quantity (name, unit, the paper's name) is taken from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from lib.analysis.batch import points
from lib.analysis.metrics import METRICS
from lib.records.jobs import slug


@dataclass(frozen=True)
class Definition:
    """A quantity: its name with the unit, its formula in LaTeX, what it means, the paper's name.

    Where one of its `words` stands in a page, the definition opens.
    """

    name: str
    formula: str
    meaning: str
    paper_name: str = ""
    words: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """The id of its row in the table of definitions."""
        return f"term-{slug(self.name)}"


def _metric(name: str, formula: str, meaning: str, *words: str) -> Definition:
    """A metric of the catalogue."""
    metric = METRICS[name]
    return Definition(metric.header, formula, meaning, metric.paper_name, words)


DEFINITIONS = (
    _metric(
        "ttft",
        r"t_{g=1}",
        "time to the first token: generate() with one new token, prefill included; median",
        "TTFT",
    ),
    Definition(
        "end-to-end latency (s)",
        r"t_g",
        "wall time of the whole call for g new tokens, synchronised at both edges",
        "p50, p95",
        ("end-to-end latency",),
    ),
    _metric(
        "output",
        r"\frac{g}{t_g}",
        "new tokens over the time of the whole call, prefill included",
        "output throughput",
    ),
    _metric(
        "decode",
        r"\left(\frac{\mathrm{d}t_g}{\mathrm{d}g}\right)^{-1}",
        "tokens a second after the first one: inverse Theil-Sen slope of end-to-end time over "
        "calls of several g; prefill is the intercept",
        "decode throughput",
    ),
    _metric(
        "tpot",
        r"\frac{\mathrm{d}t_g}{\mathrm{d}g}",
        "time per output token: 1 / decode throughput; the paper calls the output throughput so",
        "TPOT",
    ),
    _metric(
        "itl",
        r"t_{i+1}-t_i",
        "inter-token latency: gaps between tokens, stamped in separate runs",
        "ITL",
    ),
    Definition(
        "goodput (1/s)",
        r"\frac{n_{\mathrm{kept}}}{t}",
        METRICS["goodput"].formula.removesuffix(", / its time") + ", over its time",
        words=("goodput",),
    ),
    _metric(
        "tok_per_j",
        r"\frac{g}{E}",
        "generated tokens over gross energy of the call",
        "tokens per joule",
    ),
    _metric(
        "j_per_1k", r"\frac{1000\,E}{g}", "gross joules per 1,000 generated tokens", "J/1K tokens"
    ),
    Definition(
        "KV cache (bytes)",
        r"2\,l\,h\,d\,s",
        "keys and values of a token that later tokens read: of each of l layers, h heads of keys, "
        "d dimensions of a head, s bytes a number; windows and quantisation make it less",
        words=("KV cache",),
    ),
    Definition(
        "room (users)",
        r"\left\lfloor\frac{M-M_{\mathrm{weights}}-M_{\mathrm{reserve}}}{K_n}\right\rfloor",
        "users of n tokens whose caches of K bytes fit the card beside weights and a reserve, by "
        "the architecture; of an engine those that fit the cache that it reserved, in its blocks, "
        "and for another memory what its share of that would leave, which is a prediction",
        words=("room",),
    ),
    Definition(
        "workspace (bytes)",
        r"M_{\mathrm{peak}}-M_{\mathrm{base}}-M_{\mathrm{KV}}-M_{\mathrm{logits}}",
        "what the peak holds beside weights, cache and logits",
        "part of “KV contribution”",
    ),
    Definition(
        "ledger residual (bytes)",
        r"M_{\mathrm{NVML}}-\left(M_{\mathrm{context}}+M_{\mathrm{reserved}}\right)",
        "in use by NVML after the call, less the CUDA context (in use and not reserved before the "
        "call) and what the allocator reserved: weights, first use, cache, logits, experts, "
        "activations, padding, slack",
    ),
    Definition(
        "predicted peak (bytes)",
        r"\max_i\sum_j s_j\,[j\text{ lives at }i]",
        "largest sum of tensor sizes alive at once when the same forward passes run on torch’s "
        "meta device, which allocates nothing; rounded up to 512 B each",
    ),
    Definition(
        "APE",
        r"\frac{x}{A}",
        "active parameter efficiency: a rate for each 10⁹ active parameters",
        "APE",
        ("APE",),
    ),
    _metric(
        "ape_tpot",
        r"\frac{g/t_g}{A}",
        "output throughput per active 10⁹ parameters, nominal by architecture",
        "APE-TPOT",
    ),
    _metric(
        "ape_ttft",
        r"\frac{1/t_{g=1}}{A}",
        "inverse time to first token per active 10⁹ parameters",
        "APE-1/TTFT",
    ),
    _metric(
        "ape_energy",
        r"\frac{g/E}{A}",
        "tokens per joule per active 10⁹ parameters",
        "APE-energy",
    ),
    Definition(
        "active parameters, realised",
        r"A_{\mathrm{always}}+\frac{e}{N}A_{\mathrm{routed}}",
        "for one decode token, e of N experts of a layer touched: with their weights set to NaN, "
        "the output of the implementation in use has a NaN",
    ),
    Definition(
        "share of the device",
        r"\frac{t_{\mathrm{busy}}}{t}",
        "time in which the GPU works, by a profiler, over the time of the same call without one; "
        "from 0.9 on device-bound, to 0.7 host-bound",
        words=("device-bound", "host-bound"),
    ),
    Definition(
        "knee (sequences)",
        r"\min\{b: R_{2b} < 1.5\,R_b\}",
        points.RULE.removeprefix("knee: "),
        words=("knee",),
    ),
    Definition(
        "TPOT/GB",
        r"\frac{g/t_g}{M_{\mathrm{peak}}}",
        "output throughput over peak memory; the paper’s table divides by MiB / 1000",
        "TPOT/GB",
    ),
    Definition(
        "useful MBU",
        r"\frac{B\,s}{W}",
        "memory bandwidth utilisation: bytes B that a decode step must read (weights in use, "
        "cache) times steps per second s, over the bandwidth W: the datasheet’s, or the best "
        "measured read stream",
        words=("MBU", "useful MBU"),
    ),
    Definition(
        "realised MBU",
        r"\frac{B_{\mathrm{traced}}\,s}{W}",
        "with the bytes that the implementation was traced to read",
        words=("realised MBU",),
    ),
    Definition(
        "MFU of prefill",
        r"\frac{F}{t_{g=1}\,P}",
        "operations F = 2 active parameters × tokens (the output matrix once) + 4 heads × head "
        "dimension × pairs of tokens, over TTFT and the rate P of a matrix product",
        words=("MFU",),
    ),
)


def terms() -> list[dict[str, object]]:
    """The definitions that open on a word, as a page embeds them."""
    return [
        {"words": x.words, "name": x.name, "meaning": x.meaning, "anchor": x.anchor}
        for x in DEFINITIONS
        if x.words
    ]
