"""The page in a real browser: no errors, the token view draws and answers, hostile text runs nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_run import write_run

from specbeam.report.build import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u202eabc"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, report: Path, **settings):
    """The page, and the list that its errors and requests go into."""
    page = browser.new_context(viewport={"width": 1240, "height": 900}, **settings).new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(report.as_uri())
    return page, heard


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_errors_and_draws_the_tokens(browser, tmp_path, scheme):
    page, heard = opened(browser, write_report(write_run(tmp_path)), color_scheme=scheme)
    assert page.locator(".answer-tokens").count() == 2
    assert page.locator(".lanes .timeline").count() == 4, "speculative and plain, one under the other"
    assert page.locator(".answer-tokens .t:not(.x)").count() == 2 * 48
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert heard == []


def test_hovering_shows_round_and_probabilities(browser, tmp_path):
    page, heard = opened(browser, write_report(write_run(tmp_path)))
    page.locator(".answer-tokens .t.d").first.hover()
    tip = page.locator(".tip")
    assert tip.is_visible()
    for text in ("drafted, accepted", "round 1", "target's probability", "draft's probability", "ms"):
        assert text in tip.inner_text()
    page.locator(".timeline span").first.hover()
    assert "step 1" in tip.inner_text()
    assert heard == []


def test_another_prompt_can_be_chosen_and_rejected_proposals_hidden(browser, tmp_path):
    page, heard = opened(browser, write_report(write_run(tmp_path)))
    before = page.locator(".answer-tokens p").first.inner_text()
    page.locator(".token-view select").select_option("2")
    assert page.locator(".answer-tokens p").first.inner_text() != before
    assert page.locator(".t.x").nth(1).is_visible()
    page.locator(".token-view input[type=checkbox]").uncheck()
    assert page.locator(".answer-tokens .t.x:visible").count() == 0
    assert heard == []


def test_hostile_text_runs_nothing_and_is_shown(browser, tmp_path):
    page, heard = opened(browser, write_report(write_run(tmp_path, hostile=HOSTILE)))
    assert page.evaluate("window.hacked") is None
    assert "</script><script>window.hacked=1" in page.locator(".token-view").inner_text()
    assert heard == []


def test_a_narrow_screen_does_not_scroll_sideways(browser, tmp_path):
    page, _ = opened(browser, write_report(write_run(tmp_path)))
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_scripts_it_is_still_a_table(browser, tmp_path):
    page, _ = opened(browser, write_report(write_run(tmp_path)), java_script_enabled=False)
    assert page.locator("#figures table tbody tr").count() == 6
    assert page.locator("noscript").first.is_visible()


def test_it_prints(browser, tmp_path):
    page, heard = opened(browser, write_report(write_run(tmp_path)))
    assert len(page.pdf()) > 20_000 and heard == []


def test_the_beams_are_drawn_and_tell_their_scores(browser, tmp_path):
    page, heard = opened(browser, write_report(write_run(tmp_path)))
    nodes = page.locator(".beam-view .nodes > g")
    survivors = nodes.count()
    assert page.locator(".beam-view .nodes > g.win").count() == 20, "the winner's path, one node a step"
    assert page.locator(".beam-view .hypotheses tr").count() == 2
    page.locator(".beam-view .nodes > g.win").nth(3).hover()
    for text in ("step 4", "summed log-probability", "this token", "ran on as beam", "beam: round 3"):
        assert text in page.locator(".tip").inner_text()
    page.locator(".beam-view input[type=checkbox]").check()
    assert nodes.count() > survivors
    page.locator(".beam-view .nodes > g.lost").first.hover()
    assert "lost: not among the best" in page.locator(".tip").inner_text()
    page.locator(".beam-view select").select_option("1")
    assert page.locator(".beam-view .prompt").inner_text().startswith("Translate")
    assert heard == []


@pytest.fixture
def two_runs(tmp_path):
    from specbeam.report.build import page as page_of
    from specbeam.report.runs import read_run

    path = tmp_path / "both.html"
    runs = [read_run(write_run(tmp_path / name, hostile=hostile)) for name, hostile in (("a", None), ("b", HOSTILE))]
    path.write_text(page_of(runs), "utf-8")
    return path


def test_tabs_choose_the_run(browser, two_runs):
    page, heard = opened(browser, two_runs)
    assert page.locator("#run-0").is_visible() and not page.locator("#run-1").is_visible()
    assert page.locator(".tabs a[aria-selected=true]").inner_text() == "a"
    page.locator(".tabs a").nth(1).click()
    assert page.locator("#run-1").is_visible() and not page.locator("#run-0").is_visible()
    assert page.locator("#run-1 .answer-tokens").count() == 2 and page.locator("#run-1 .beam-band").count() > 0
    page.locator("#run-1 .answer-tokens .t.d").first.hover()
    assert "round 1" in page.locator(".tip").inner_text()
    assert page.evaluate("window.hacked") is None and heard == []


def test_without_scripts_and_on_paper_all_runs_are_there(browser, two_runs):
    page, _ = opened(browser, two_runs, java_script_enabled=False)
    assert page.locator("#run-0").is_visible() and page.locator("#run-1").is_visible()
    page, heard = opened(browser, two_runs)
    page.emulate_media(media="print")
    assert page.locator("#run-1").is_visible()
    assert len(page.pdf()) > 30_000 and heard == []


def test_two_runs_on_a_narrow_screen_do_not_scroll_sideways(browser, two_runs):
    page, _ = opened(browser, two_runs)
    page.set_viewport_size({"width": 390, "height": 800})
    page.reload()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
