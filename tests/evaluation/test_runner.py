"""Every number of a row, against the plain way to compute it; and runs that stop and go on."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.evaluation import (
    Settings,
    check,
    make_cases,
    make_folder,
    make_task,
    parse_policies,
    read_rows,
    resolved_config,
    run,
    runner,
    summarize,
)
from kvjax.evaluation.report import pareto_front, plot, table, title
from kvjax.evaluation.results import FILE
from kvjax.evaluation.runner import KEPT
from kvjax.policies import PolicyError
from tests import tiny

POLICIES = (
    "full; chunkkv(0.5, chunk=4, score=snapkv(window=4)); tova(0.5); streaming_llm(0.5); "
    "knorm(0.5) | kivi(bits=4, group=16, residual=16)"
)
ROWS = [
    {"context_ids": tiny.TOKENS[i, :length].tolist(), "question_ids": tiny.QUESTION[i].tolist(), "answer_ids": answers}
    for i, length, answers in [(0, 48, [5, 6, 7]), (1, 40, [[5, 6], [8, 9]])]
]


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return make_task(str(path))


def go(model, task, folder, settings, count=None):
    config = resolved_config("tiny", np.float32, task, settings)
    cases = make_cases(task, task.samples(model), settings)
    check(model, cases, settings)
    rows = read_rows(folder, config)
    return run(model, task, cases[:count], settings, config, folder, rows)


@pytest.fixture(scope="module")
def ran(model, task, tmp_path_factory):
    settings = Settings(policies=parse_policies(POLICIES), protocol="agnostic", tokens=4)
    return settings, go(model, task, tmp_path_factory.mktemp("ran"), settings)


def straight(model, row, answer):
    """Log-probabilities [len(answer), vocab] after context and question, by one forward pass without a cache."""
    tokens = jnp.asarray([row["context_ids"] + row["question_ids"] + list(answer)])
    log_p = jax.nn.log_softmax(kvjax.forward(model.params, model.config, tokens)[0], -1)
    return np.asarray(log_p, np.float64)[-len(answer) - 1 : -1]


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_the_full_cache_scores_as_a_forward_pass(model, task, tmp_path, protocol):
    rows = go(
        model, task, tmp_path, Settings(policies=parse_policies("full"), protocol=protocol, speed=False, tokens=4)
    )
    for row, given in zip(rows, ROWS, strict=True):
        answers = given["answer_ids"] if isinstance(given["answer_ids"][0], list) else [given["answer_ids"]]
        log_p = [straight(model, given, a)[range(len(a)), a].sum() for a in answers]
        best = max(range(len(answers)), key=lambda i: log_p[i] / len(answers[i]))
        assert row["log_likelihood"] == pytest.approx(log_p[best], abs=1e-3)
        assert row["nll"] == pytest.approx(-log_p[best] / len(answers[best]), abs=1e-3)
        assert row["kl"] == pytest.approx(0, abs=1e-6) and row["top1"] == 1
        assert row["prompt_tokens"] == len(given["context_ids"]) + (len(given["question_ids"]) - 1) * (
            protocol == "aware"
        )


def test_what_greedy_decoding_writes_is_correct(model, tmp_path):
    context, question = tiny.TOKENS[0].tolist(), tiny.QUESTION[0].tolist()
    for policy in ("full", "tova(0.5)"):
        cache = model.prefill(context, policy)
        written = model.generate(question, cache=cache, max_new_tokens=3, stop=[])
        path = tmp_path / f"{policy[:4]}.jsonl"
        path.write_text(json.dumps({"context_ids": context, "question_ids": question, "answer_ids": written}))
        settings = Settings(policies=parse_policies(policy), protocol="agnostic", speed=False, tokens=4)
        folder = tmp_path / policy[:4]
        make_folder(folder)
        row = next(row for row in go(model, make_task(str(path)), folder, settings) if row["policy"] == policy)
        assert row["score"] == 1


def test_every_policy_scores_and_weighs_as_its_own_prefill(model, ran):
    settings, rows = ran
    assert len(rows) == len(ROWS) * len(settings.policies)
    for row, (given, policy) in zip(rows, [(g, p) for g in ROWS for p in settings.policies], strict=True):
        assert row["policy"] == str(policy)
        cache = model.prefill(given["context_ids"], policy)
        assert row["nbytes"] == cache.nbytes and row["compression"] == pytest.approx(cache.compression)
        held = [max(map(len, layer)) for layer in tiny.kept(cache, 0)]
        assert row["kept"] == held
        if given is ROWS[0]:
            answer = given["answer_ids"]
            # The question is in the cache before the answer comes: what is packed by then is read as packed.
            asked, cache = model.extend(cache, given["question_ids"])
            logits, _ = model.extend(cache, answer)
            log_p = np.asarray(jax.nn.log_softmax(jnp.concatenate([asked[0, -1:], logits[0, :-1]]), -1))
            assert row["log_likelihood"] == pytest.approx(log_p[range(len(answer)), answer].sum(), abs=2e-3)


def test_divergence_is_along_the_full_caches_own_text(model, ran):
    settings, rows = ran
    given = ROWS[0]
    written = model.generate(
        given["question_ids"],
        cache=model.prefill(given["context_ids"], "full"),
        max_new_tokens=settings.tokens,
        stop=[],
    )
    log_p = straight(model, given, written)
    logits, _ = model.extend(model.prefill(given["context_ids"], "tova(0.5)"), given["question_ids"] + written)
    log_q = np.asarray(jax.nn.log_softmax(logits[0], -1), np.float64)[-len(written) - 1 : -1]
    row = next(row for row in rows if row["policy"] == "tova(0.5)")
    assert row["kl"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), abs=1e-4)
    assert row["top1"] == (log_p.argmax(-1) == log_q.argmax(-1)).mean()


def test_rows_say_where_they_come_from(ran):
    for row in ran[1]:
        assert row["config"]["policies"] and row["config"]["task"]["sha256"] and len(row["config_hash"]) == 12
        assert set(row["versions"]) == {"kvjax", "jax", "jaxlib", "python"} and row["device"] and row["time"]
        assert row["decode_tokens_per_s"] > 0
    seconds = {row["sample"]: row["prefill_s"] for row in ran[1]}
    assert list(seconds.values())[0] is None and all(each > 0 for each in list(seconds.values())[1:])  # Compiled first.


def test_an_interrupted_run_goes_on(model, task, tmp_path, monkeypatch):
    settings = Settings(policies=parse_policies("full; knorm(0.5)"), speed=False, tokens=4)
    first = go(model, task, tmp_path, settings, count=1)
    seen = []
    see = runner.see
    monkeypatch.setattr(runner, "see", lambda *args: seen.append(1) or see(*args))
    rows = go(model, task, tmp_path, settings)
    assert rows[:2] == first and len(rows) == 4 and len(seen) == 1
    assert json.loads((tmp_path / FILE).read_text()) == rows
    assert {file.name for file in tmp_path.iterdir()} == {FILE, KEPT}


def test_a_sample_that_fails_leaves_the_file_whole(model, task, tmp_path, monkeypatch):
    settings = Settings(policies=parse_policies("full; knorm(0.5)"), speed=False, tokens=4)
    go(model, task, tmp_path, settings, count=1)
    before = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr(runner, "config_hash", lambda config: object())  # Cannot be written as JSON.
    with pytest.raises(TypeError):
        go(model, task, tmp_path, settings)
    assert (tmp_path / FILE).read_bytes() == before and {file.name for file in tmp_path.iterdir()} == {FILE, KEPT}


def test_results_of_other_settings_are_refused(model, task, tmp_path):
    go(model, task, tmp_path, Settings(policies=parse_policies("full"), speed=False, tokens=4), count=1)
    other = Settings(policies=parse_policies("full; knorm(0.5)"), speed=False, tokens=4)
    with pytest.raises(ValueError, match="other settings .policies."):
        go(model, task, tmp_path, other)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match="no results of kvjax"):
        go(model, task, tmp_path, other)
    assert read_rows(tmp_path, {}, overwrite=True) == []


def test_questions_about_one_context_share_its_prefill(model, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(ROWS[0] | {"answer_ids": [i]}) for i in (5, 6, 7)))
    seen = []
    see = runner.see
    monkeypatch.setattr(runner, "see", lambda *args: seen.append(1) or see(*args))
    go(
        model,
        make_task(str(path)),
        tmp_path,
        Settings(policies=parse_policies("full"), protocol="agnostic", speed=False),
    )
    assert len(seen) == 1


def test_what_cannot_work_is_known_before(model, task):
    def checked(policies, **changes):
        settings = Settings(policies=parse_policies(policies), **changes)
        check(model, make_cases(task, task.samples(model), settings), settings)

    with pytest.raises(PolicyError, match="least"):
        checked("snapkv(4)")
    with pytest.raises(ValueError, match="model's context is 512"):
        checked("full", tokens=1000)
    with pytest.raises(PolicyError, match="same policy"):
        parse_policies("snapkv(0.5); snapkv(budget=0.5)")
    with pytest.raises(ValueError, match="aware or agnostic"):
        Settings(policies=(), protocol="both")  # type: ignore[arg-type]


def test_the_report(ran, tmp_path):
    _, rows = ran
    summaries = summarize(rows)
    assert [row["policy"] for row in summaries] == list(dict.fromkeys(row["policy"] for row in rows))
    assert summaries[0]["samples"] == 2 and summaries[0]["smaller"] == summaries[0]["decode_ratio"] == 1
    assert table(summaries).row_count == len(summaries) and "2 samples" in title(rows)
    assert all(0 <= row["low"] <= row["score"] <= row["high"] <= 1 for row in summaries)
    assert summaries[0]["differences"] == {} and table(summaries).caption is None  # Two contexts show no difference.
    often = summarize([{**row, "sample": f"{row['sample']}-{i}", "context": f"{i}"} for i in range(9) for row in rows])
    found = {row["policy"]: row["differences"]["nll"] for row in often[1:]}
    worst = max(found.values(), key=lambda one: abs(one["mean"]))
    assert worst["differs"] and worst["p"] == pytest.approx(2**-8) and worst["low"] <= worst["mean"] <= worst["high"]
    assert "differs from full" in str(table(often).caption)
    plot(summaries, tmp_path / "pareto.png", title(rows))
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    perplexity = [{key: value for key, value in row.items() if key != "score"} for row in rows]
    again = summarize(perplexity)
    assert again[0]["perplexity"] == pytest.approx(math.exp(summaries[0]["nll"]))
    plot(again, tmp_path / "ppl.png", title(perplexity))


def test_the_pareto_front():
    points = [(4.0, 1.0), (1.0, 0.2), (2.0, 0.9), (3.0, 0.5), (2.0, 0.1)]
    assert pareto_front(points, more=True) == [1, 2, 0]
    assert pareto_front(points, more=False) == [1, 4]


@pytest.mark.slow
@pytest.mark.optimized
def test_gemma_finds_every_needle_in_its_full_cache(gemma, tmp_path):
    task = make_task("needle", count=3)
    settings = Settings(policies=parse_policies("full; random(0.25)"), speed=False)
    summaries = summarize(go(gemma, task, tmp_path, settings))
    assert summaries[0]["score"] == 1 and summaries[1]["score"] == 0
