"""RULER's thirteen tasks with their published configurations (arXiv 2404.06654, scripts/synthetic.yaml)."""

from typing import Any

from kvjax.evaluation.tasks.base import Entry
from kvjax.evaluation.tasks.ruler_niah import Niah
from kvjax.evaluation.tasks.ruler_qa import Questions
from kvjax.evaluation.tasks.ruler_vt import Tracking
from kvjax.evaluation.tasks.ruler_words import CommonWords, FrequentWords

DEFAULTS = {"keys": "words", "kind": "numbers", "needles": 1, "values": 1, "queries": 1}


def _niah(name: str, about: str, **configuration: Any) -> Entry:
    return Entry(kind=Niah, group="ruler", about=about, fixed={"name": name} | DEFAULTS | configuration)


def _qa(name: str, data: str, about: str) -> Entry:
    return Entry(kind=Questions, group="ruler", about=about, fixed={"name": name, "data": data})


ENTRIES = (
    _niah("niah_single_1", "finds a number in noise", hay="noise"),
    _niah("niah_single_2", "finds a number in an essay", hay="essay"),
    _niah("niah_single_3", "finds a UUID in an essay", hay="essay", kind="uuids"),
    _niah("niah_multikey_1", "finds one of four numbers in an essay", hay="essay", needles=4),
    _niah("niah_multikey_2", "finds a number among nothing but others", hay="needle"),
    _niah("niah_multikey_3", "finds the UUID of a UUID among others", hay="needle", keys="uuids", kind="uuids"),
    _niah("niah_multivalue", "finds all four numbers of a key in an essay", hay="essay", values=4),
    _niah("niah_multiquery", "finds the numbers of four keys in an essay", hay="essay", needles=4, queries=4),
    _qa("qa_1", "squad", "answers a question about documents (path of a SQuAD 2.0 file)"),
    _qa("qa_2", "hotpotqa", "answers a question that takes two documents (path of a HotpotQA file)"),
)
TASKS = {
    **{entry.fixed["name"]: entry for entry in ENTRIES[:8]},
    "vt": Entry(kind=Tracking, group="ruler", about="names all variables of a chain of assignments"),
    "cwe": Entry(kind=CommonWords, group="ruler", about="names the ten words that come most often in a list"),
    "fwe": Entry(kind=FrequentWords, group="ruler", about="names the three most frequent coded words"),
    **{entry.fixed["name"]: entry for entry in ENTRIES[8:]},
}
