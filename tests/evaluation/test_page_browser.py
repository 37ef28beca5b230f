"""The page as people use it: in a browser, by mouse and by keyboard, in light and dark, on a phone."""

import dataclasses
import pathlib
import shutil
from xml.etree import ElementTree

import pytest

from kvjax.evaluation.page import Run, make_page, page_data, read_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium (apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason='needs pip install -e ".[test]"')

RUN = pathlib.Path(__file__).parents[1] / "data" / "run"
SECTIONS = ("board", "pareto", "tasks", "needles", "drift", "kept", "heads")
FIGURES = ("pareto-bytes", "pareto-speed", "tasks", "needles", "drift-kl", "drift-top1", "budgets", "tokens", "heads")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(make_page(page_data(asked_often(read_run(RUN)))), encoding="utf-8")
    return path.as_uri()


def asked_often(run: Run) -> Run:
    """Three times as many contexts: so many that policies differ."""

    def of(row, i):
        return {**row, "sample": f"{row['sample']}-{i}", "context": f"{row['context']}-{i}"}

    jobs = [dataclasses.replace(job, rows=[of(row, i) for i in range(3) for row in job.rows]) for job in run.jobs]
    return dataclasses.replace(run, jobs=tuple(jobs))


@pytest.fixture(scope="module")
def address_of_two(tmp_path_factory):
    """Of a run of two models, the second with one job only."""
    run = read_run(RUN)
    rows = [{**row, "model": "other", "score": 0.0} for row in run.jobs[0].rows]
    path = tmp_path_factory.mktemp("page") / "report.html"
    jobs = (*run.jobs, dataclasses.replace(run.jobs[0], name="other/needle", rows=rows))
    path.write_text(make_page(page_data(dataclasses.replace(run, jobs=jobs))), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page; afterwards there must have been no complaint and no request but for the page itself."""
    contexts, complaints, requests, addresses = [], [], [], set()

    def open_page(hash: str = "", width: int = 1280, scheme: str = "light", touch: bool = False, at: str = address):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        addresses.add(at)
        page.goto(at + hash)
        page.wait_for_selector("#kept-text span")
        return page

    yield open_page
    assert complaints == []
    outside = [url for url in requests if not url.startswith(("data:", "blob:"))]
    assert outside and {url.split("#")[0] for url in outside} == addresses
    for context in contexts:
        context.close()


def policies(page) -> list[str]:
    return page.eval_on_selector_all("#board-table tbody tr[data-policy]", "rows => rows.map(r => r.dataset.policy)")


def column(page, number: int) -> list[float]:
    cells = page.locator(f"#board-table tbody td:nth-child({number + 1})").all_inner_texts()
    return [float(cell.split()[0].rstrip("▲▼").replace("<", "")) for cell in cells]


def settled(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


OUTSIDE = """() => [...document.querySelectorAll("svg[role=img] text")].filter((text) => {
  const [inner, outer] = [text, text.closest("svg")].map((node) => node.getBoundingClientRect());
  return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
}).map((text) => text.textContent)"""


@pytest.mark.parametrize("policy", ["", "full"])
def test_no_word_of_a_figure_is_cut(visit, policy):
    page = visit()
    page.get_by_role("searchbox", name="Policy").fill(policy)
    settled(page)
    assert page.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_stands_in_anyones_way(visit, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason='needs pip install -e ".[test]"')
    page = visit(width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(fold => (fold.open = true))")
    page.locator("#figure-heads table").wait_for()
    found = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]][:3]) for rule in found] == []


def test_all_parts_are_there(visit):
    page = visit()
    assert page.locator("h1").inner_text() == "The house model, squeezed"
    for name in SECTIONS:
        assert page.locator(f"#{name}").is_visible()
    for name in FIGURES:
        assert page.locator(f"#figure-{name} .canvas").bounding_box()["height"] > 60, name
    assert len(policies(page)) == page.locator("#figure-pareto-bytes .dot").count() == 12 - 1
    assert page.locator("#figure-needles rect").count() > 5 * 11
    assert "cpu" in page.locator("#facts").inner_text()


def test_sorting(visit):
    page = visit()
    heads = page.locator("#board-table thead th")
    assert page.locator("th[aria-sort=descending]").inner_text() == "score, %"
    scores = column(page, 1)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 3
    page.locator("[data-sort=kl]").click()
    settled(page)
    divergences = column(page, [text.strip() for text in heads.all_inner_texts()].index("KL"))
    assert divergences == sorted(divergences) and len(set(divergences)) > 3
    assert page.locator("th[aria-sort]").count() == 1
    assert page.locator("th[aria-sort=ascending]").inner_text() == "KL"
    page.locator("[data-sort=kl]").click()
    settled(page)
    assert page.locator("th[aria-sort=descending]").inner_text() == "KL"
    for key in page.eval_on_selector_all("[data-sort]", "nodes => nodes.map(n => n.dataset.sort)"):
        page.locator(f"[data-sort={key}]").click()
        settled(page)
        assert page.locator(f"th[aria-sort] [data-sort={key}]").count() == 1


def test_filters_change_tables_and_plots(visit):
    page = visit()
    everything = policies(page)
    page.locator("input[name=q]").fill("SnapKV kivi")
    settled(page)
    chosen = [name for name in everything if "snapkv" in name and "kivi" in name]
    assert policies(page) == chosen != []
    assert page.locator("#figure-pareto-bytes .dot").count() == len(chosen)
    assert page.locator("#count").inner_text() == f"{len(chosen)} of {len(everything)} policies"
    page.locator("#reset").click()
    page.locator("select[name=budget]").select_option("25%B")
    settled(page)
    assert set(policies(page)) == {name for name in everything if "25%B" in name or name == "full"}
    page.locator("#reset").click()
    before = column(page, 1)
    page.locator("select[name=task]").select_option("needle")
    page.locator("select[name=protocol]").select_option("aware")
    settled(page)
    assert column(page, 1) != before and set(column(page, 1)) <= {0, 20, 40, 60, 80, 100}
    page.locator("select[name=task]").select_option("drift")
    settled(page)
    assert "There is no job" in page.locator("#board-table").inner_text()


def test_what_is_chosen_is_in_the_address(visit):
    page = visit()
    page.locator("select[name=task]").select_option("ppl")
    page.locator("input[name=q]").fill("kv")
    page.locator("[data-sort=nbytes]").click()
    settled(page)
    shown, hash = policies(page), page.evaluate("location.hash")
    other = visit(hash)
    assert policies(other) == shown
    assert other.locator("select[name=task]").input_value() == "ppl"
    assert other.locator("input[name=q]").input_value() == "kv"
    assert other.locator("th[aria-sort=ascending]").inner_text() == "cache"
    other.evaluate("location.hash = ''")
    settled(other)
    assert len(policies(other)) == 11


def test_by_keyboard_alone(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the leaderboard"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "board-title"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.sort") == "nbytes":
            break
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator("th[aria-sort=ascending]").inner_text() == "cache"
    assert page.evaluate("document.activeElement.dataset.sort") == "nbytes"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('dot')"):
            break
    first = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert page.locator("#tip").inner_text().split("\n")[0] == first.split(";")[0]
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert second != first and page.locator("#tip").inner_text().startswith(second.split(";")[0])
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("!document.activeElement.closest('#figure-pareto-bytes .canvas')")


def test_another_policy_to_compare_with(visit):
    page, least = visit(), "random('25%B')"
    marks = "rows => Object.fromEntries(rows.map(r => [r.dataset.policy, r.querySelector('td .verdict').innerText]))"

    def compare_with(name, policy):
        page.locator("select[name=against]").select_option(name)
        settled(page)
        assert name in page.locator("#differences summary").inner_text()
        rows = page.locator("#difference-table tbody tr")
        assert rows.count() == len(policies(page)) - 1  # A policy does not differ from itself.
        cells = page.locator(f'#difference-table tr[data-policy="{policy}"] td').all_inner_texts()
        return page.eval_on_selector_all("#board-table tbody tr", marks), cells

    page.locator("#differences summary").click()
    before, less = compare_with("full", least)
    after, more = compare_with(least, "full")
    assert before[least] == after["full"].replace("▲", "▼").replace("better", "worse").replace(least, "full") != ""
    assert before["full"] == after[least] == "" and "against=random" in page.evaluate("location.hash")
    assert less[0].startswith("−") and "▼" in less[0] and "+" + less[0][1:].replace("▼", "▲").split("▲")[0] in more[0]
    assert less[2] == more[2]  # The same test.


def test_one_model_at_a_time(visit, address_of_two):
    assert visit().locator("select[name=model]").count() == 0
    page = visit(at=address_of_two)
    assert max(column(page, 1)) > 0 and page.locator("#figure-heads").is_visible()
    jobs = page.locator("select[name=job] option").count()
    page.locator("select[name=model]").select_option("other")
    page.wait_for_function("() => document.querySelector('select[name=job]').options.length === 1")
    settled(page)
    assert set(column(page, 1)) == {0} and "other" in page.locator("#board-about").inner_text()
    assert page.locator("#figure-heads").is_hidden() and page.locator("#figure-drift-kl").is_hidden()
    assert page.locator("#figure-needles").is_visible() and page.locator("#figure-budgets").is_visible()
    page.locator("#reset").click()
    page.wait_for_function("jobs => document.querySelector('select[name=job]').options.length === jobs", arg=jobs)
    assert max(column(page, 1)) > 0 and page.locator("#figure-heads").is_visible()


def test_numbers_of_figures_by_keyboard(visit):
    page = visit()
    for name in ("needles", "drift-kl", "budgets", "tokens", "heads"):
        fold = page.locator(f"#figure-{name} .fold")
        assert fold.locator("table").count() == 0
        fold.locator("summary").focus()
        page.keyboard.press("Enter")
        fold.locator("table").wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.fold').parentNode.id") == f"figure-{name}"
        cells = fold.locator("tbody td").all_inner_texts()
        assert len(cells) > 10 and all(any(digit.isdigit() for digit in cell) for cell in cells), name
    first = page.locator("#figure-budgets tbody tr").first.inner_text().split("\t")
    assert first[0] == "full" and first[2] == page.locator("#figure-budgets svg text[style]").first.text_content()
    page.locator("input[name=q]").fill("random")
    settled(page)
    names = set(page.locator("#figure-budgets tbody th:first-child").all_inner_texts())
    assert names and all("random" in name for name in names)
    page.locator("#kept > .fold summary").click()
    page.locator("#kept > .fold table").wait_for()
    assert page.locator("#kept > .fold tbody tr").count() == page.locator("#kept-text span").count()


def test_a_finger_sees_what_a_pointer_does(visit):
    page = visit(width=390, touch=True)
    for where in ("#figure-needles g > rect", "#figure-budgets g > rect", "#figure-tokens g > rect", "#kept-text span"):
        node = page.locator(where).nth(30)
        node.scroll_into_view_if_needed()
        page.wait_for_timeout(100)  # What scrolling hides, it hides a moment later.
        node.tap()
        assert page.locator("#tip").is_visible(), where
        assert any(char.isdigit() for char in page.locator("#tip").inner_text())
    page.locator("#kept-title").tap()
    assert page.locator("#tip").is_hidden()


def test_the_text_shows_who_stays(visit):
    page = visit("#shown=full")
    shades = "spans => spans.map(s => Number(getComputedStyle(s).backgroundColor.split(',')[3]?.slice(0, -1) ?? 1))"
    assert set(page.eval_on_selector_all("#kept-text span", shades)) == {1}
    page.locator("select[name=shown]").select_option("streaming_llm('25%B')")
    settled(page)
    levels = page.eval_on_selector_all("#kept-text span", shades)
    assert levels[0] == levels[-1] == 1 and levels[len(levels) // 2] == 0
    assert sum(levels) / len(levels) == pytest.approx(0.25, abs=0.02)
    page.locator("select[name=job]").select_option("ppl-300-agnostic")
    page.wait_for_function("count => document.querySelectorAll('#kept-text span').length !== count", arg=len(levels))
    assert page.locator("#kept-text span").count() == 300


def test_every_figure_can_be_saved(visit, tmp_path):
    page = visit(scheme="dark")
    for name in FIGURES:
        for kind in ("svg", "png"):
            with page.expect_download() as download:
                page.locator(f"#figure-{name} [data-export={kind}]").click()
            assert download.value.suggested_filename == f"{name}.{kind}"
            path = tmp_path / f"{name}.{kind}"
            download.value.save_as(path)
            if kind == "png":
                head = path.read_bytes()[:24]
                width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
                assert head[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 100
                continue
            root = ElementTree.parse(path).getroot()
            assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(list(root.iter())) > 20
            assert "var(" not in path.read_text(encoding="utf-8") and "class=" not in path.read_text(encoding="utf-8")


def test_a_phone_scrolls_one_way(visit):
    page = visit(width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    table = page.locator("#board > .scroll")
    assert table.evaluate("node => node.scrollWidth > node.clientWidth")
    inner = "nodes => nodes.map(node => node.scrollWidth - node.clientWidth)"
    assert max(page.eval_on_selector_all(".canvas:has(> .scroll)", inner)) == 0  # No scroller in a scroller.
    page.evaluate("document.querySelectorAll('details').forEach(fold => (fold.open = true))")
    page.locator("#figure-heads table").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.set_viewport_size({"width": 320, "height": 700})
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_who_prefers_little_motion_gets_none(browser, address):
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(address)
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    context.close()
