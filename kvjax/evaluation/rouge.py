"""ROUGE as two packages compute it, whose results differ: benchmarks were scored with one or the other.

`rouge_l` gives the `f` of "rouge-l" of the package rouge (LongBench): sentences end at full stops, and words count once
however often they come. `rouge_n`, `rouge_lcs` and `rouge_l_sum` give what the package rouge-score does without
stemming (Hugging Face's `evaluate`, SCBench, InfiniteBench): words are runs of a-z and 0-9 in lower case.
"""

import collections
import itertools
import re
from collections.abc import Sequence

Words = Sequence[str]


def _table(a: Words, b: Words) -> list[list[int]]:
    """[i][j]: length of the longest common subsequence of a[:i] and b[:j]."""
    table = [[0] * (len(b) + 1)]
    for word in a:
        above, row = table[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common(a: Words, b: Words, prefer_a: bool) -> list[int]:
    """Indices into `a` of one of the longest common subsequences.

    Args:
      prefer_a: Of two ways that are equally good, go back in `a`; otherwise in `b`.
    """
    table = _table(a, b)
    i, j, found = len(a), len(b), []
    while i and j:
        up, left = table[i - 1][j], table[i][j - 1]
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif up > left or (up == left and prefer_a):
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _f(hits: int, written: int, wanted: int) -> float:
    precision, recall = hits / max(written, 1), hits / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


# The package rouge


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of rouge-l as the package rouge computes it; 0 where it would raise."""
    written, wanted = _sentences(prediction), _sentences(reference)
    if not written or not wanted:
        return 0.0
    together: set[str] = set()
    for ours, theirs in itertools.product(wanted, written):
        together |= {ours[i] for i in _common(ours, theirs, prefer_a=False)}
    precision, recall = (len(together) / len(set(itertools.chain(*sentences))) for sentences in (written, wanted))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # An empty sentence has one word, the empty one: that is how the package splits.
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


# The package rouge-score


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_n(prediction: str, reference: str, n: int) -> float:
    """F1 of n-grams."""

    def grams(text: str) -> collections.Counter[tuple[str, ...]]:
        tokens = words(text)
        return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    written, wanted = grams(prediction), grams(reference)
    return _f((written & wanted).total(), written.total(), wanted.total())


def rouge_lcs(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence: rougeL."""
    written, wanted = words(prediction), words(reference)
    return _f(_table(wanted, written)[-1][-1], len(written), len(wanted))


def rouge_l_sum(prediction: str, reference: str) -> float:
    """F1 of the union of longest common subsequences of lines: rougeLsum."""
    written, wanted = ([words(line) for line in text.split("\n") if line] for text in (prediction, reference))
    left = [collections.Counter(itertools.chain(*lines)) for lines in (written, wanted)]
    totals = [count.total() for count in left]
    hits = 0
    for line in wanted:
        for i in sorted({i for other in written for i in _common(line, other, prefer_a=True)}):
            if left[0][line[i]] > 0 and left[1][line[i]] > 0:
                hits += 1
                left[0][line[i]] -= 1
                left[1][line[i]] -= 1
    return _f(hits, *totals)
