"""An instructor's afternoon in formgrader: generate, autograde, give points by hand, release feedback."""

from __future__ import annotations

import re

import pytest

from autograder.demo import LAB, hand_in, set_up
from autograder.grading import grade
from tests.browser.conftest import jupyterlab

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]
STUDENT = "dara"


@pytest.fixture(scope="module")
def course_folder(tmp_path_factory):
    """A course with one submission."""
    folder = tmp_path_factory.mktemp("formgrader") / "course"
    set_up(folder)
    hand_in(folder, [STUDENT])
    # what `nbgrader submit` adds, and by which feedback finds its way back
    notes = {"timestamp.txt": "2026-10-02 15:58:23.948203 UTC", "submission_secret.txt": "a secret"}
    for name, text in notes.items():
        (folder / "submitted" / STUDENT / LAB / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def formgrader(open_page, course_folder):
    """Formgrader in JupyterLab, opened by its menu: (page, what is in its tab)."""
    home, exchange = course_folder.parent / "home", course_folder.parent / "exchange"
    home.mkdir()
    exchange.mkdir()
    (home / "nbgrader_config.py").write_text(f"c = get_config()\nc.Exchange.root = {str(exchange)!r}\n")
    with jupyterlab(course_folder, home) as address:
        page = open_page(address(""))
        for item in ("Nbgrader", "Formgrader"):
            page.get_by_role("menuitem", name=item, exact=True).click()
        yield page, page.frame_locator("iframe")
        page.close()


def test_the_afternoon(formgrader, course_folder, picture):
    from playwright.sync_api import expect

    page, tab = formgrader

    def press(button: str, name: str) -> None:
        """Press a button of the table's only row, and close the message of success, in which there is no traceback."""
        tab.locator(f"td.{button} a").click()
        message = tab.locator(".modal.in")
        title = message.get_by_text(re.compile("^(Success|Error)$"))
        title.wait_for()
        picture(page, name)
        said = message.inner_text()
        assert title.inner_text() == "Success" and "Traceback" not in said, said
        message.get_by_role("button", name="OK").click()
        message.wait_for(state="detached")

    tab.locator("td.name", has_text=LAB).wait_for()
    press("assign", "instructor-1-generated")
    tab.locator("td.num-submissions a").click()
    press("autograde", "instructor-2-autograded")
    report = grade(course_folder / "submitted" / STUDENT / LAB / f"{LAB}.ipynb")
    expect(tab.locator("td.score")).to_have_text(f"{report.score:g} / 100")
    expect(tab.locator("td.status")).to_have_text("needs manual grading")

    tab.get_by_role("link", name="Manual Grading").click()
    for link in (LAB, LAB, "Submission"):
        tab.locator("td a", has_text=link).click()
    tab.locator("#code_style[placeholder]").wait_for()  # the points come after the page
    scores = {box.get_attribute("id"): box.get_attribute("placeholder") for box in tab.locator("input.score").all()}
    assert {check.name: f"{check.points:g}" for check in report.checks}.items() <= scores.items()
    assert tab.get_by_text("ᾱ_t in place of α_t").count() == 1, "the hint is in view"
    for task, points, level in (
        ("written_analysis", 6, "All three answered, mostly with evidence"),
        ("code_quality", 3, "Names from the field"),
    ):
        panel = tab.locator(".nbgrader_cell", has=page.locator(f"#{task}"))
        panel.scroll_into_view_if_needed()
        assert panel.get_by_text(level).is_visible(), "the rubric is in view beside the box for the points"
        picture(page, f"instructor-3-{task}")
        with page.expect_response(lambda r: r.request.method == "PUT" and "/api/grade/" in r.url) as saved:
            tab.locator(f"#{task}").fill(f"{points}")
            tab.locator(f"#{task}").press("Tab")
        assert saved.value.ok
    with page.expect_response(lambda r: r.request.method == "PUT" and "/api/comment/" in r.url):
        tab.locator("#code_quality-comment").fill("Tidy work.")
        tab.locator("#code_quality-comment").press("Tab")

    for link in ("Manual Grading", "Manage Assignments"):
        tab.get_by_role("link", name=link).click()
    tab.locator("td.num-submissions a").click()
    expect(tab.locator("td.score")).to_have_text(f"{report.score + 9:g} / 100")
    expect(tab.locator("td.status")).to_have_text("graded")
    press("generate-feedback", "instructor-4-feedback")
    press("release-feedback", "instructor-5-released")
    (released,) = (course_folder.parent / "exchange").glob("*/feedback/*.html")
    html = released.read_text(encoding="utf-8")
    assert "Tidy work." in html and f"{report.score + 9:g}</b> of 100 points" in html
    assert "ᾱ_t in place of α_t" in html
