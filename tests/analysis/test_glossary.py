"""The glossary: each word once, and the quantities that readers ask for."""

from collections import Counter

from lib.analysis import glossary
from lib.analysis.metrics import METRICS
from lib.show.notebook_html import mathml

ASKED = ("MBU", "APE", "knee", "TTFT", "TPOT", "ITL", "goodput", "KV cache", "decode throughput")


def test_each_word_has_one_definition():
    words = Counter(word.lower() for x in glossary.DEFINITIONS for word in x.words)
    assert [word for word, n in words.items() if n > 1] == []
    assert {word.lower() for word in ASKED} <= words.keys()
    anchors = [x.anchor for x in glossary.DEFINITIONS]
    assert len(set(anchors)) == len(anchors)


def test_a_definition_has_a_formula_and_says_more_than_its_name():
    for x in glossary.DEFINITIONS:
        assert "<math" in mathml(x.formula), x.name
        assert len(x.meaning.split()) > 3 and x.meaning != x.name


def test_what_the_catalogue_defines_is_taken_from_it():
    names = {x.name for x in glossary.DEFINITIONS}
    for name in ("ttft", "output", "decode", "tpot", "itl", "j_per_1k", "ape_tpot"):
        assert METRICS[name].header in names


def test_terms_are_the_definitions_with_words():
    words = [word for term in glossary.terms() for word in term["words"]]
    assert set(ASKED) <= set(words)
    assert all(term["meaning"] and term["anchor"].startswith("term-") for term in glossary.terms())
