"""The page of a run: what it reads, what its numbers are, and that its file stands alone. `tests/data/run` is a run of
the house model that was stopped before its last two jobs.
"""

import json
import math
import pathlib
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from kvjax.cli import app
from kvjax.evaluation.comparison import MEASURES
from kvjax.evaluation.leaderboard import difference_table, leaderboard, leaderboard_table
from kvjax.evaluation.page import data as page_module, make_page, page_data, read_run
from kvjax.evaluation.page.data import COLUMNS, LEVELS, unpack

RUN = pathlib.Path(__file__).parents[1] / "data" / "run"


@pytest.fixture(scope="module")
def run():
    return read_run(RUN)


@pytest.fixture(scope="module")
def data(run):
    return page_data(run)


def copied(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(RUN, tmp_path / "run"))


def two_models(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run of two models, each with a folder of its own; the second has but one job, in which it knows nothing."""
    grid = json.loads((RUN / "grid.json").read_text())
    jobs = [f"tiny/{name}" for name in grid["jobs"]] + ["other/needle-300-aware"]
    shutil.copytree(RUN, tmp_path / "two" / "tiny", ignore=shutil.ignore_patterns("grid.json"))
    place = pathlib.Path(shutil.copytree(RUN / "needle-300-aware", tmp_path / "two" / "other" / "needle-300-aware"))
    rows = json.loads((place / "results.json").read_text())
    changed = [{**row, "model": "models/other", "score": 0.0, "nll": row["nll"] + 1} for row in rows]
    (place / "results.json").write_text(json.dumps(changed))
    grid = {key: value for key, value in grid.items() if key != "model"}
    (tmp_path / "two" / "grid.json").write_text(json.dumps({**grid, "models": ["tiny", "models/other"], "jobs": jobs}))
    return tmp_path / "two"


def inlined(page: str):
    return json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])


# Reading


def test_jobs_come_in_the_grids_order_and_unfinished_ones_are_left_out(run):
    assert [job.name for job in run.jobs] == [
        "needle-300-aware",
        "needle-300-agnostic",
        "drift-300-agnostic",
        "ppl-300-agnostic",
    ]
    assert len(run.grid["jobs"]) > len(run.jobs)
    assert all(job.kept for job in run.jobs)


def test_a_folder_of_one_job_is_a_run(tmp_path):
    for name in ("results.json", "kept.json"):
        shutil.copy(RUN / "needle-300-aware" / name, tmp_path)
    run = read_run(tmp_path)
    data = page_data(run)
    assert len(run.jobs) == 1 and data["config"] == run.rows[0]["config"]
    assert data["heads"] == [] and data["drift"] == [] and len(data["kept"]) == 1


def test_what_is_missing_is_left_out(tmp_path):
    folder = copied(tmp_path)
    (folder / "heads.json").unlink()
    for path in folder.glob("*/kept.json"):
        path.unlink()
    shutil.rmtree(folder / "drift-300-agnostic")
    data = page_data(read_run(folder))
    assert data["heads"] == [] and data["kept"] == [] and data["drift"] == [] and data["needles"]


@pytest.mark.parametrize(
    "text, why",
    [
        ("[]", "holds no results"),
        ("[{", "Cannot read"),
        ("{}", "should hold a list"),
        ('[{"policy": "full"}]', "has no task"),
        ("[1]", "no mapping"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, text, why):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        read_run(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results.*kvjax eval"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        read_run(tmp_path / "nowhere")


def test_models_have_boards_of_their_own(run, data, tmp_path):
    two = read_run(two_models(tmp_path))
    assert [job.name for job in two.jobs] == [f"tiny/{job.name}" for job in run.jobs] + ["other/needle-300-aware"]
    found = page_data(two)
    assert found["models"] == ["tiny", "other"]
    for key, at in data["keys"].items():
        assert found["boards"][found["keys"][key]] == data["boards"][at]
    other = found["boards"][found["keys"]["1/*/*/*"]]
    assert {row[1] for row in other} == {0} and other[0][0] == 0 and len(other) == len(data["policies"])
    assert [heads["model"] for heads in found["heads"]] == [0]
    assert {needle["model"] for needle in found["needles"]} == {0, 1}
    board = leaderboard(two.rows)
    assert [row["policy"] for row in board if row["smaller"] == 1] == ["full", "full"]
    alone = leaderboard(run.rows)
    assert board[: len(alone)] == alone
    assert leaderboard_table(board).row_count == len(board) + 2 and leaderboard_table(alone).row_count == len(alone)
    assert difference_table(board).row_count == len(board) - 2
    only = [row for row in two.rows if (row["model"], row["policy"]) != ("models/other", "kivi")]
    assert difference_table(leaderboard(only, against="kivi")).row_count == len(alone) - 1


def test_figures_of_two_models_do_not_overwrite_each_other(tmp_path):
    from kvjax.evaluation.page.figures import write_figures

    data = page_data(read_run(two_models(tmp_path)))
    (tmp_path / "figures").mkdir()
    stems = {path.stem for path in write_figures({**data, "kept": [], "drift": []}, tmp_path / "figures")}
    assert stems >= {"pareto-bytes-tiny", "pareto-bytes-other", "tasks-tiny", "heads-tiny"}
    assert {"needles-needle-aware-tiny", "needles-needle-aware-other"} <= stems and "heads-other" not in stems


# Numbers


def test_boards_are_the_leaderboards(run, data):
    names = [policy["name"] for policy in data["policies"]]
    of = {"0/*/*/*": run.rows, "0/0/*/0": run.jobs[0].rows, "0/0/0/1": run.jobs[1].rows}
    for key, rows in of.items():
        board = data["boards"][data["keys"][key]]
        expected = leaderboard(rows)
        assert [names[row[0]] for row in board] == [row["policy"] for row in expected]
        for row, other in zip(board, expected, strict=True):
            for value, column in zip(row[1:], COLUMNS, strict=True):
                known = other[column] is not None and math.isfinite(other[column])
                assert value == (pytest.approx(other[column], rel=1e-4) if known else None), column


def test_pairs_are_the_leaderboards_differences(run, data):
    names = [policy["name"] for policy in data["policies"]]
    pairs = unpack(data["pairs"])[data["keys"]["0/*/*/*"]]
    assert set(MEASURES) < set(pairs)
    for against in (0, 1, 5):
        expected = {row["policy"]: row["differences"] for row in leaderboard(run.rows, against=names[against])}
        assert expected.pop(names[against]) == {}
        for name, found in expected.items():
            a, b = pairs["policies"].index(names.index(name)), pairs["policies"].index(against)
            for key, one in found.items():
                pair = pairs[key]["pairs"][max(a, b)][min(a, b)]
                mean, low, high = (one["mean"], one["low"], one["high"])
                if a < b:
                    mean, low, high = -mean, high and -high, low and -low
                shown = [mean, low, high, one["p"]]
                assert pair == [x if x is None else pytest.approx(x, rel=6e-3, abs=1e-9) for x in shown], (name, key)
                assert pairs[key]["differs"][b][a] == str(int(one["differs"]))


def test_all_jobs_count_alike_and_perplexity_stands_apart(run, data):
    column = {name: i + 1 for i, name in enumerate(COLUMNS)}
    full = data["boards"][data["keys"]["0/*/*/*"]][0]
    scores = [np.mean([row["score"] for row in job.rows if row["policy"] == "full"]) for job in run.jobs[:2]]
    logs = [np.log(row["perplexity"]) for row in run.jobs[3].rows if row["policy"] == "full"]
    assert full[column["score"]] == pytest.approx(np.mean(scores), rel=1e-4)
    assert full[column["perplexity"]] == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)


def test_choices_of_the_same_jobs_share_a_board_and_impossible_ones_have_none(data):
    keys = data["keys"]
    drift = [task["name"] for task in data["tasks"]].index("drift")
    aware = data["protocols"].index("aware")
    assert keys[f"0/{drift}/*/*"] == keys[f"0/{drift}/0/*"]
    assert f"0/{drift}/*/{aware}" not in keys
    assert len(data["boards"]) == len(set(keys.values()))


def test_needles_are_means_of_their_samples(run, data):
    needle = next(needle for needle in data["needles"] if needle["protocol"] == "aware")
    assert needle["depths"] == [0.0, 0.25, 0.5, 0.75, 1.0] and needle["lengths"] == [300]
    for i, policy in enumerate(needle["policies"]):
        for d, depth in enumerate(needle["depths"]):
            rows = [row for row in run.jobs[0].rows if row["policy"] == data["policies"][policy]["name"]]
            assert needle["scores"][i][d] == [np.mean([row["score"] for row in rows if row["depth"] == depth])]


def test_many_depths_fall_into_bins(run):
    job = run.jobs[0]
    rows = [{**job.rows[0], "sample": str(i), "depth": i / 49, "score": float(i < 5)} for i in range(50)]
    needle = page_module._needles(rows, [rows[0]["model"]], [rows[0]["policy"]])[0]
    assert len(needle["depths"]) == 10
    assert [row[0] for row in needle["scores"][0]] == [1.0] + 9 * [0.0]


def test_drift_is_the_mean_of_curves(run, data):
    job, (drift,) = run.jobs[2], data["drift"]
    assert drift["tokens"] == 96
    for policy, curve in zip(drift["policies"], drift["kl"], strict=True):
        mine = [row["kl_curve"] for row in job.rows if row["policy"] == data["policies"][policy]["name"]]
        assert curve == pytest.approx(np.mean(mine, 0), rel=1e-4, abs=1e-12)


def test_who_stays_is_packed_and_unpacked(run, data):
    for job, packed in zip(run.jobs, data["kept"], strict=True):
        kept = unpack(packed["packed"])
        assert kept["tokens"] == job.kept["tokens"]
        for policy, heads, share in zip(kept["policies"], kept["heads"], kept["share"], strict=True):
            given = job.kept["policies"][data["policies"][policy]["name"]]
            assert heads == given["heads"]
            shown = [int(level, 36) / LEVELS for level in share]
            assert shown == pytest.approx(given["share"], abs=0.5 / LEVELS + 1e-9)


def test_prompts_that_would_make_the_page_large_are_named_instead(run, monkeypatch):
    sizes = [len(kept["packed"]) for kept in page_data(run)["kept"]]
    monkeypatch.setattr(page_module, "PACKED", sizes[0] + sizes[1])
    data = page_data(run)
    assert [kept["job"] for kept in data["kept"]] == [job.name for job in run.jobs[:2]]
    assert data["kept_left_out"] == [job.name for job in run.jobs[2:]]


def test_a_store_without_positions_has_no_tokens_to_show(run, data):
    kept = {"tokens": ["a"], "layers": [0], "policies": {"full": {"heads": [[1]], "share": None}}}
    assert page_module.kept_of(kept, ["full"])["share"] == [None]


# The file


def test_the_page_asks_for_nothing_else(data):
    page = make_page(data)
    without = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest", without)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"#board"}
    assert "default-src 'none'" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert inlined(page) == json.loads(json.dumps(data))
    assert len(page) < 500_000


def test_what_data_say_is_never_markup(data):
    evil = "</script><script>alert(1)</script><!-- {{script}}"
    page = make_page(
        {**data, "title": evil, "policies": [{**data["policies"][0], "name": evil}, *data["policies"][1:]]}
    )
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<!--" not in page
    assert inlined(page)["policies"][0]["name"] == evil and inlined(page)["title"] == evil


def test_numbers_that_json_has_no_word_for():
    assert [page_module._short(x) for x in (float("nan"), float("-inf"), None, True, 2.0)] == [
        None,
        None,
        None,
        True,
        2,
    ]


# The command


def test_report(tmp_path):
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    done = CliRunner().invoke(app, ["report", str(RUN), "--out", str(out), "--figures", str(figures)])
    assert done.exit_code == 0, done.output
    data = inlined(out.read_text(encoding="utf-8"))
    assert data["title"] == "The house model, squeezed"
    stems = {path.stem for path in figures.iterdir()}
    assert stems >= {
        "pareto-bytes",
        "pareto-speed",
        "tasks",
        "heads",
        "needles-needle-aware",
        "drift-drift-300-agnostic",
    }
    assert {
        f"{kind}-{job}" for kind in ("budgets", "tokens") for job in ("needle-300-aware", "ppl-300-agnostic")
    } < stems
    assert {path.name for path in figures.iterdir()} == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    for path in figures.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for path in figures.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    for stem in ("pareto-bytes", "pareto-speed"):
        texts = [
            "".join(x.itertext()) for x in ElementTree.parse(figures / f"{stem}.svg").iter() if x.tag.endswith("text")
        ]
        assert {policy["name"] for policy in data["policies"]} <= set(texts), "every point has its name"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_report_against_a_policy(tmp_path):
    out = str(tmp_path / "page.html")
    asked = ["report", str(RUN), "--out", out, "--against"]
    done = CliRunner().invoke(app, [*asked, 'snapkv("25%B")'])
    assert done.exit_code == 0, done.output
    lines = [
        line for line in done.output.splitlines() if line.startswith(("full ", "random('25%B') ", "snapkv('25%B') "))
    ]
    assert [line.split()[0] for line in lines].count("full") == 1 and not any(" to " not in line for line in lines)
    assert not any(line.startswith("snapkv('25%B')  ") for line in lines)
    data = inlined(pathlib.Path(out).read_text(encoding="utf-8"))
    assert data["policies"][data["against"]]["name"] == "snapkv('25%B')"
    done = CliRunner().invoke(app, [*asked, "streamin_llm('25%B')"])
    assert done.exit_code == 2 and "Did you mean streaming_llm('25%B')" in done.output


def test_report_of_no_run(tmp_path):
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "holds no results" in done.output and list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(app, ["report", str(RUN), "--out", str(tmp_path / "none" / "page.html")])
    assert done.exit_code == 2 and "There is no folder" in done.output
