"""A student's first hour in JupyterLab: what the page shows while Lab 5 is got wrong, got right, run as a whole."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.browser.conftest import jupyterlab

LAB = "lab05_sampling"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

# How much lighter than the other the lighter of two colours is: by WCAG 2, 4.5 and more can be read.
CONTRAST = """element => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05 };
    let behind = element;
    while (/, 0\\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
    return Math.max(a, b) / Math.min(a, b) }"""


class Notebook:
    """A notebook in JupyterLab, its cells named by their ids."""

    def __init__(self, page, folder, cells):
        self.page, self.folder = page, folder
        self.ids = [cell["id"] for cell in cells]
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()

    def cell(self, name):
        """The cell with that id."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.ids.index(name))

    def output(self, name):
        """What is below it."""
        return self.cell(name).locator(".jp-Cell-outputArea")

    def write(self, name, source):
        """Put other code into it."""
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)

    def start(self, name):
        """Start it."""
        self.cell(name).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Control+Enter")

    def run(self, name):
        """Run it, wait until it is done, give what it printed as one line."""
        prompt = self.cell(name).locator(".jp-InputPrompt")
        before = prompt.inner_text()
        self.start(name)
        self._wait_until_done(prompt, before)
        return " ".join(self.output(name).inner_text().split())

    def run_all(self):
        """Run > Run All Cells, and wait until the last cell is done."""
        last = self.page.locator(".jp-CodeCell .jp-InputPrompt").last
        before = last.inner_text()
        for item in ("Run", "Run All Cells"):
            self.page.get_by_role("menuitem", name=item, exact=True).click()
        self._wait_until_done(last, before)

    def _wait_until_done(self, prompt, before):
        done = "([element, before]) => element.innerText != before && /\\[\\d+\\]/.test(element.innerText)"
        self.page.wait_for_function(done, arg=[prompt.element_handle(), before])


@pytest.fixture(scope="module")
def notebook(open_page, tmp_path_factory, course, student):
    """Lab 5 as students get it, open in JupyterLab."""
    folder, home = tmp_path_factory.mktemp("labs"), tmp_path_factory.mktemp("home")
    shutil.copytree(course / "labs" / LAB, folder / LAB)
    with jupyterlab(folder, home) as address:
        page = open_page(address(f"{LAB}/{LAB}.ipynb"))
        yield Notebook(page, folder / LAB, student(LAB).cells)
        page.close()


@pytest.fixture(scope="module")
def answers(solution):
    """The solution's code by cell id."""
    cells = solution(LAB).cells
    return {cell["id"]: re.sub(r" *### (BEGIN|END) SOLUTION\n?", "", cell.source).rstrip() for cell in cells}


def test_the_first_hour(notebook, answers, picture):
    """Do the first cells run without a red line, and is each hint one that can be read, the green line, too?"""
    page = notebook.page
    red = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
    assert "num_timesteps=1000" in notebook.run("setup")
    for name in ("forward-process-class", "add-noise-code"):
        notebook.run(name)
    assert red.count() == 0
    assert notebook.run("add-noise") == "○ add_noise: TODO: add_noise is still to be written"
    picture(page, "student-1-to-do")
    for name in ("add-noise-code", "forward-trajectory-code"):
        notebook.write(name, answers[name])
        notebook.run(name)
    assert notebook.run("add-noise") == "✓ add_noise: 4 points"
    notebook.run("demo-10")
    drawing = notebook.output("demo-10").locator("img")
    drawing.scroll_into_view_if_needed()
    assert drawing.bounding_box()["width"] > 600 and drawing.evaluate("image => image.naturalWidth") > 600
    picture(page, "student-2-plot")

    notebook.run("ddpm-class")
    right = answers["ddpm-posterior-mean-code"]
    for code, verdict in (
        (right.replace("/ alpha.sqrt()", "/ alpha_bar.sqrt()"), "these values are what ᾱ_t in place of α_t"),
        (right, "✓ ddpm_posterior_mean: 7 points"),
    ):
        notebook.write("ddpm-posterior-mean-code", code)
        notebook.run("ddpm-posterior-mean-code")
        said = notebook.run("ddpm-posterior-mean")
        assert verdict in said and "Traceback" not in said and len(said) < 300
        words = notebook.output("ddpm-posterior-mean").locator("pre")
        for element in [words, *words.locator("span").all()]:
            # JupyterLab's own green, on white, has 3.3
            assert element.evaluate(CONTRAST) > (4.5 if "what" in verdict else 3), "this cannot be read"
        picture(page, "student-3-wrong" if "what" in verdict else "student-4-right")


# As long as it takes the test to see the bar.
LONG_CELL = """from pathlib import Path

with progress(model, 10**6):
    while not Path("seen").exists():
        model(x_T[:1], torch.zeros(1))
print("done")"""


def test_a_long_cell_shows_how_far_it_is(notebook, picture):
    """Is there a bar that moves, that is no red box, and that goes away at the end?"""
    notebook.run("setup")
    notebook.write("demo-10", LONG_CELL)
    notebook.start("demo-10")
    bar = notebook.output("demo-10").get_by_text(re.compile(r"\d+/1000000 .*network calls"))
    bar.wait_for()
    assert bar.locator("xpath=ancestor::*[@data-mime-type]").get_attribute("data-mime-type").endswith("stdout")
    picture(notebook.page, "student-5-progress")
    (notebook.folder / "seen").touch()
    bar.wait_for(state="detached")
    assert notebook.output("demo-10").inner_text().strip() == "done"


def test_run_all_of_a_half_done_notebook(notebook, picture):
    """Does it go through to the end, each missing exercise one line, and nothing red from our side?"""
    notebook.run_all()
    said = notebook.output("code-style").inner_text()
    assert "code_style" in said and "Traceback" not in said
    to_do = notebook.output("demo-36").inner_text().strip()  # above it is where the bar was
    assert to_do == "○ sample: TODO: write this method", to_do
    for name in ("ddim-eta-step", "cached-sampling", "health-check"):
        assert re.fullmatch(r"○ \w+: TODO: \w+ is still to be written", notebook.output(name).inner_text().strip())
    assert notebook.page.get_by_text("Warning:").count() == 0
    notebook.cell("ddim-eta-step").scroll_into_view_if_needed()
    picture(notebook.page, "student-6-run-all")
