"""Differences between policies: of what they both served, by contexts, and of each measure."""

import math

import pytest

from kvjax.evaluation.comparison import MEASURES, difference, differences, jobs_of, named, score_interval


def row(policy, sample, score, protocol="aware", task="needle", nll=1.0, **more):
    return {
        "model": "tiny",
        "policy": policy,
        "task": task,
        "protocol": protocol,
        "sample": sample,
        "context": f"{task}-{sample}",
        "score": score,
        "nll": nll,
        **more,
    }


def two(contexts=6, protocols=("aware", "agnostic")):
    """One policy right everywhere and one wrong."""
    return [
        row(policy, str(i), score, protocol, nll=1.5 - score)
        for protocol in protocols
        for i in range(contexts)
        for policy, score in (("full", 1.0), ("random", 0.0))
    ]


def test_what_one_context_has_in_two_jobs_counts_once():
    jobs = jobs_of(two())
    found = difference(jobs["random"], jobs["full"], MEASURES["score"])
    assert found and found.mean == -1 and found.p == 2 / 2**6
    assert score_interval(jobs["full"]) == pytest.approx(score_interval(jobs_of(two(protocols=("aware",)))["full"]))
    apart = [{**row, "context": f"{row['protocol']}-{row['context']}"} for row in two()]
    jobs = jobs_of(apart)
    assert difference(jobs["random"], jobs["full"], MEASURES["score"]).p == 2 / 2**12
    assert score_interval(jobs["full"])[0] > score_interval(jobs_of(two())["full"])[0]


def test_jobs_of_two_models_are_two():
    rows = [row("full", "0", 1.0), row("full", "0", 0.0, model="other"), row("full", "1", 1.0)]
    assert [len(of) for of in jobs_of(rows)["full"].values()] == [2, 1]


def test_policies_are_compared_on_what_both_served():
    rows = two(protocols=("aware",)) + [row("full", "9", 0.0), row("full", "0", 0.0, task="copy")]
    rows += [row("other", "0", 0.0, task="vt")]
    jobs = jobs_of(rows)
    assert difference(jobs["random"], jobs["full"], MEASURES["score"]).mean == -1
    assert difference(jobs["other"], jobs["full"], MEASURES["score"]) is None
    assert set(differences(jobs, "full", MEASURES["score"])) == {"random"}


def test_likelihoods_are_compared_too():
    rows = [
        {**of, "nll": of["nll"] + 0.01 * int(of["sample"]), "perplexity": math.exp(2 * of["nll"])}
        for of in two(protocols=("aware",))
        if of["policy"] == "full"
    ]
    worse = [{**of, "policy": "random", "nll": of["nll"] + 1 + 0.1 * int(of["sample"])} for of in rows]
    jobs = jobs_of(rows + [{**of, "perplexity": 2 * of["perplexity"]} for of in worse])
    nll = differences(jobs, "full", MEASURES["nll"])["random"]
    assert nll.mean == pytest.approx(1.25) and nll.differs and nll.p == 2 / 2**6
    assert nll.low == pytest.approx(1.25 - 2.5706 * 0.1 * (3.5 / 6) ** 0.5, abs=1e-4)
    perplexity = differences(jobs, "full", MEASURES["perplexity"])["random"]
    assert (perplexity.mean, perplexity.low) == pytest.approx((math.log(2), math.log(2)))
    jobs = jobs_of(two(contexts=1))
    alone = difference(jobs["random"], jobs["full"], MEASURES["nll"])
    assert alone and alone.low is None and alone.high is None and alone.p == 1


def test_stars_are_corrected_for_the_number_of_policies():
    rows = two(protocols=("aware",))  # p is 1/32.
    assert differences(jobs_of(rows), "full", MEASURES["score"])["random"].differs
    rows += [{**of, "policy": "tova"} for of in rows if of["policy"] == "random"]
    assert not any(one.differs for one in differences(jobs_of(rows), "full", MEASURES["score"]).values())


def test_policies_by_their_names():
    names = ["full", "keydiff('25%B')", "snapkv(0.25, window=16)"]
    assert named('keydiff("25%B")', names) == names[1] and named("snapkv(0.25,window=16)", names) == names[2]
    with pytest.raises(ValueError, match="Did you mean keydiff"):
        named("keydif('25%B')", names)
