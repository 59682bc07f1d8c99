"""Part 5: the table, the report, the page; read as a reader would, whatever they are made with."""

import base64
import math
import re

import torch

from autograder.checks import expect, graded
from autograder.checks.lab06.devices import between
from autograder.checks.lab06.documents import Document, Section, has, numbers, read_markdown, squeezed
from autograder.submission.client import StudentError

SECTIONS = (
    "Abstract", "Introduction", "Methodology", "Results", "Analysis", "Conclusion and Future Work",
    "Appendix A: Run log", "Appendix B: Environment",
)  # fmt: skip
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "inlet",
    "jetty",
    "kayak",
    "lemon",
    "maple",
    "north",
    "olive",
    "pearl",
    "quartz",
    "river",
]


def _words(rng, count: int) -> str:
    return " ".join(WORDS[k] for k in torch.randperm(len(WORDS), generator=rng)[:count].tolist())


def _picture(rng) -> str:
    data = torch.randint(256, (60,), generator=rng, dtype=torch.uint8).numpy().tobytes()
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG" + data).decode()


def _text(value, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        got = "None: is a `return` missing?" if value is None else f"{value!r:.60}"
        expect.fail(f"{what} should return a text; got {got}")
    return value


@graded(points=3, section="Report")
def test_report_table(submission, rng):
    """`markdown_table` makes a row of each dict, with numbers legible and every cell plain text."""
    words = _words(rng, 4).split()
    rows = [
        {"run": 1, "num_steps": 100, "seconds": 3.0 + between(rng, 0.01, 0.04), "note": words[0], "left_out": "SECRET"},
        {"run": 2, "num_steps": 7, "seconds": -between(rng, 1.13, 1.17) * 1e-6, "note": words[1], "left_out": "SECRET"},
        {
            "run": 3,
            "num_steps": 50000,
            "seconds": between(rng, 1e-3, 2e-3),
            "note": f"{words[2]} 42",
            "left_out": "SECRET",
        },
    ]
    columns = {"num_steps": "steps", "seconds": "time in s", "note": words[3]}
    text = _text(submission.markdown_table(rows, columns), "markdown_table")
    table = _one_table(text, len(rows))
    if [squeezed(cell) for cell in table[0]] != list(columns.values()):
        expect.fail(
            f"the line of headings should be {list(columns.values())}, in this order; a reader sees {table[0]}."
        )
    if "SECRET" in text:
        expect.fail("keys that are not in `columns` should be left out.")
    for row, cells in zip(rows, table[1:]):
        wanted = [row[key] for key in columns]
        if (
            len(cells) != len(columns)
            or squeezed(cells[2]) != row["note"]
            or squeezed(cells[0]) != str(row["num_steps"])
        ):
            expect.fail(f"the row of {wanted} shows as {cells}.")
        if not has(numbers(cells[1]), row["seconds"]):
            expect.fail(
                f"a float needs three significant digits, small ones too: {row['seconds']:.6g} shows as {cells[1]!r} (try a format like .4g)."
            )
    _hold_plain(submission, words)


def _one_table(text: str, rows: int) -> list[list[str]]:
    tables = [table for section in read_markdown(text).sections.values() for table in section.tables]
    if len(tables) != 1:
        expect.fail(
            "a reader of the Markdown should see one table: a line of headings, a line of dashes (|---|---|), and the rows."
        )
    if len(tables[0]) != rows + 1:
        expect.fail(
            f"a line of headings and {rows} rows were expected; a reader sees {len(tables[0])} lines in the table."
        )
    return tables[0]


def _hold_plain(submission, words):
    """What is special to Markdown tables and HTML shows as it is."""
    for value, seen, what in (
        (f"{words[0]} | {words[1]}", None, "a | in a cell starts a new column; write \\|"),
        (f"{words[0]}\n{words[1]}", f"{words[0]} {words[1]}", "a line break in a cell ends the row; write a space"),
        (f"<b>{words[0]}</b>", None, "<b> in a cell becomes markup; write < as &lt;"),
        (f"{words[0]} &lt; {words[1]}", None, "&lt; in a cell shows as <; write & as &amp;"),
        (f"{words[0]} & {words[1]} < 3", None, "& and < in a cell should show as they are"),
    ):
        text = _text(submission.markdown_table([{"a": value, "b": 5}], {"a": "name", "b": "value"}), "markdown_table")
        cells = [squeezed(cell) for row in _rows_or_hint(text, what)[1:] for cell in row]
        if cells != [seen or value, "5"]:
            expect.fail(f"{what}. ({value!r} shows as {cells[:3]}.)")


def _rows_or_hint(text, what):
    try:
        return _one_table(text, 1)
    except expect.CheckFailed:
        expect.fail(f"{what}.")


def _study(rng) -> dict:
    """A study with numbers of its own everywhere."""

    def records(counts, runs):
        times = [
            {"run": run + 1, "num_steps": n, "seconds": 0.03 * n + between(rng, 0.01, 0.9)}
            for run in range(runs)
            for n in (counts[k] for k in torch.randperm(len(counts), generator=rng).tolist())
        ]
        return times

    counts = sorted((torch.randperm(60, generator=rng)[:5] + 3).tolist())
    log = records(counts, 3)
    extra = [record | {"run": 4} for record in records([*counts[1:3], 75], 1)]  # a later series, with other counts
    slope, intercept = between(rng, 0.02, 0.04), between(rng, 0.11, 0.19)
    return {
        "hypothesis": f"We expect {_words(rng, 6)}.",
        "conclusion": f"We conclude {_words(rng, 6)}.",
        "method": {"independent variable": _words(rng, 2), "images at once": int(between(rng, 11, 90)), "warm-up": _words(rng, 3)},
        "environment": {"device": f"Accelerator {_words(rng, 1).upper()} 9000", "PyTorch": f"2.{int(between(rng, 10, 90))}.1", "date": _words(rng, 3)},
        "records": sorted(log[:5], key=lambda record: -record["num_steps"]) + log[5:] + extra,
        "reference": {"device": f"Machine {_words(rng, 1).title()}", "records": records([11, 52, 107], 2)},
        "fit": {
            "n": len(log + extra), "intercept": intercept, "slope": slope, "residual_std": between(rng, 0.002, 0.009),
            "intercept_interval": [intercept - between(rng, 0.05, 0.06), intercept + between(rng, 0.05, 0.06)],
            "slope_interval": [slope - between(rng, 0.003, 0.006), slope + between(rng, 0.003, 0.006)],
        },
        "decision": {
            "law": ("linear", "affine", "sub-linear", "super-linear")[int(torch.randint(4, (), generator=rng))],
            "curvature": between(rng, 1.13, 1.17) * 1e-7, "curvature_interval": [-between(rng, 1e-6, 9e-6), between(rng, 1e-6, 9e-6)],
        },
        "log_log_slope": between(rng, 0.71, 0.99),
        "split": {"step": between(rng, 0.041, 0.049), "network": between(rng, 0.031, 0.039), "sampler": between(rng, 0.0001, 0.0009), "fixed": between(rng, 0.21, 0.29)},
        "batches": [{"batch_size": size, "seconds": between(rng, 0.3, 9), "seconds_per_image": between(rng, 0.01, 0.2)} for size in (1, 3, 9)],
        "quality": [
            {"num_steps": n, "frechet": between(rng, 20, 90), "recognised": between(rng, 0.2, 0.9), "distance": between(rng, 0.01, 0.5)}
            for n in (4, 14, 44)
        ],
        "figures": {f"Figure of {_words(rng, 2)}": _picture(rng), f"Plot of {_words(rng, 3)}": _picture(rng)},
    }  # fmt: skip


@graded(points=7, section="Report")
def test_report_markdown(submission, rng):
    """`build_report` puts every number, table, figure and text of the study into its section."""
    study = _study(rng)
    page = read_markdown(_text(submission.build_report(study), "build_report"))
    found = [heading for heading in page.sections if heading in SECTIONS]
    missing = [heading for heading in SECTIONS if heading not in found]
    if missing:
        expect.fail(f"the section {missing[0]!r} is missing; each is a heading of the second level: ## {missing[0]}")
    if found != list(SECTIONS):
        expect.fail(f"the sections should stand in the order {', '.join(SECTIONS)}.")
    if page.live:
        expect.fail(f"the report should be text, tables and embedded figures; it holds {page.live[0]}.")
    parts = {heading: page.sections[heading] for heading in SECTIONS}
    fit, decision = study["fit"], study["decision"]

    _hold_words(parts["Abstract"], {"the law": decision["law"], "the device": study["environment"]["device"]})
    _hold_numbers(parts["Abstract"], {"the number of measurements": fit["n"]})
    _hold_words(parts["Introduction"], {"the hypothesis": study["hypothesis"]})
    _hold_words(parts["Conclusion and Future Work"], {"the conclusion": study["conclusion"]})
    _hold_named(parts["Methodology"], study["method"])
    _hold_named(parts["Appendix B: Environment"], study["environment"])
    _hold_results(parts["Results"], study)
    _hold_analysis(parts["Analysis"], study)
    _hold_log(parts["Appendix A: Run log"], study["records"])


def _hold_words(section: Section, wanted: dict[str, str]):
    for what, words in wanted.items():
        # whole words: "sub-linear" does not say "linear"
        if not re.search(rf"(?<![\w-]){re.escape(squeezed(words))}(?![\w-])", squeezed(section.text), re.IGNORECASE):
            expect.fail(f"{section.heading}: {what} is missing ({words[:60]!r} was expected there).")


def _hold_numbers(section: Section, wanted: dict[str, float], found: list[float] | None = None):
    found = numbers(section.text) if found is None else found
    for what, value in wanted.items():
        if not has(found, value):
            expect.fail(
                f"{section.heading}: {what} is missing ({value:.4g} was expected there, with three significant digits)."
            )


def _hold_named(section: Section, values: dict):
    """A row of name and value for each."""
    seen = {tuple(squeezed(cell) for cell in row[:2]) for row in section.rows()}
    for name, value in values.items():
        if (name, squeezed(str(value))) not in seen:
            expect.fail(f"{section.heading}: a table should have a row of {name!r} and {str(value)!r}.")


def _hold_results(section: Section, study: dict):
    _hold_seconds(section, study["records"], "your measurements")
    _hold_words(section, {"the device of the reference": study["reference"]["device"]})
    _hold_seconds(section, study["reference"]["records"], "the reference")
    for caption, address in study["figures"].items():
        if address not in [source for _, source in section.images]:
            expect.fail(f"{section.heading}: the figure {caption!r} is missing: ![caption](address).")
        if caption not in squeezed(section.text) and not any(caption in alt for alt, _ in section.images):
            expect.fail(f"{section.heading}: the figure's caption {caption!r} is missing.")


def _hold_seconds(section: Section, records: list[dict], whose: str):
    """A row for each step count, ascending, and a column for each run."""
    runs = sorted({record["run"] for record in records})
    counts = sorted({record["num_steps"] for record in records})
    candidates = [[row for row in table if row and len(numbers(row[0])) == 1] for table in section.tables]
    candidates = [body for body in candidates if sorted(numbers(row[0])[0] for row in body) == counts]
    if not candidates:
        expect.fail(
            f"{section.heading}: there should be a table of {whose} with one row for each step count, {counts}, which stands in its first column."
        )
    problems = []
    for body in candidates:  # beside this table there may be others, such as one of medians
        try:
            return _hold_seconds_table(section, body, records, counts, runs, whose)
        except expect.CheckFailed as problem:
            problems.append(problem)
    raise problems[0]


def _hold_seconds_table(section: Section, body: list[list[str]], records: list[dict], counts, runs, whose: str):
    if [numbers(row[0])[0] for row in body] != counts:
        expect.fail(f"{section.heading}: the rows of {whose} should be in ascending order of the step counts.")
    for row, n in zip(body, counts):
        known = {record["run"]: record["seconds"] for record in records if record["num_steps"] == n}
        for column, run in enumerate(runs, 1):
            cell = numbers(row[column]) if column < len(row) else []
            if run in known and not has(cell, known[run]):
                expect.fail(
                    f"{section.heading}: in the row of {n} steps, the column of run {run} of {whose} should show {known[run]:.4g} s; "
                    f"the row is {[squeezed(c) for c in row]}."
                )
            if run not in known and cell:
                expect.fail(
                    f"{section.heading}: run {run} of {whose} did not hold {n} steps; that cell should be empty, it shows {row[column]!r}."
                )


def _hold_analysis(section: Section, study: dict):
    fit, decision = study["fit"], study["decision"]
    _hold_words(section, {"the law": decision["law"]})
    wanted = {"the slope": fit["slope"], "the intercept": fit["intercept"], "the residual deviation": fit["residual_std"],
              "the log-log slope": study["log_log_slope"], "the curvature": decision["curvature"]}  # fmt: skip
    for name, ends in (
        ("slope", fit["slope_interval"]),
        ("intercept", fit["intercept_interval"]),
        ("curvature", decision["curvature_interval"]),
    ):
        wanted |= {
            f"the lower end of the interval of the {name}": ends[0],
            f"the upper end of the interval of the {name}": ends[1],
        }
    _hold_numbers(section, wanted)
    in_tables = [number for row in section.rows() for cell in row for number in numbers(cell)]
    _hold_numbers(
        section, {f'"{name}" of split, in a table,': value for name, value in study["split"].items()}, in_tables
    )
    rows = [[numbers(cell) for cell in row] for row in section.rows()]
    for what in ("batches", "quality"):
        for record in study[what]:
            if not any(all(_in_row(row, key, value) for key, value in record.items()) for row in rows):
                values = ", ".join(f"{value:.4g}" for value in record.values())
                expect.fail(
                    f"{section.heading}: a table should have a row with {values}, from `{what}` ({', '.join(record)})."
                )


def _in_row(row: list[list[float]], key: str, value: float) -> bool:
    found = [number for cell in row for number in cell]
    return has(found, value) or (key == "recognised" and has(found, 100 * value))


def _hold_log(section: Section, records: list[dict]):
    rows = [[numbers(cell) for cell in row[:3]] for row in section.rows()]
    rows = [[cell[0] for cell in row] for row in rows if len(row) == 3 and all(len(cell) == 1 for cell in row)]
    if len(rows) != len(records):
        expect.fail(
            f"{section.heading}: a table should have a row for each of {len(records)} records: run, steps, seconds; found {len(rows)}."
        )
    for number, (row, record) in enumerate(zip(rows, records), 1):
        wanted = [record["run"], record["num_steps"], record["seconds"]]
        if row[:2] != wanted[:2] or not math.isclose(row[2], wanted[2], rel_tol=0.0051):
            expect.fail(
                f"{section.heading}: row {number} should be run {wanted[0]}, {wanted[1]} steps, {wanted[2]:.4g} s, in the order measured; it is {row}."
            )


@graded(points=4, section="Report")
def test_report_html(submission, rng):
    """`report_html` makes one page that loads nothing, runs nothing, and shows all of the report."""
    words = _words(rng, 8).split()
    picture, value = _picture(rng), between(rng, 1, 2)
    markdown = (
        f"# {words[0]}\n\n## {words[1]}\n\nSome *{words[2]}*, and 3 < 4 & 5.\n\n| a | b |\n|---|---|\n| {words[3]} | {value:.4f} |\n\n"
        f"![{words[4]}]({picture})\n\n"
        f'## {words[5]}\n\n<script>alert("{words[6]}")</script>\n\nAnd <b onclick="x()">{words[7]}</b>, '
        "[text](javascript:alert(1)), [link](https://example.org/).\n"
    )
    title = f"{words[0]} & {words[1]} </title><b>"
    text = _text(submission.report_html(markdown, title), "report_html")
    if not text.lstrip().lower().startswith("<!doctype html>"):
        expect.fail("a web page begins with <!doctype html>, and goes on with <html>, <head> and <body>.")
    page = Document(text)
    lacking = [tag for tag in ("html", "head", "title", "body") if tag not in page.tags]
    if lacking:
        expect.fail(f"the page has no <{lacking[0]}>.")
    if page.charset.lower() not in ("utf-8", "utf8"):
        expect.fail('the page should name its encoding, <meta charset="utf-8">, or ᾱ and ε show as rubbish.')
    if page.live:
        expect.fail(
            f"the page should run nothing and load nothing from elsewhere; it holds {page.live[0]}. (HTML in the Markdown must show as text.)"
        )
    if "url(" in page.style.lower() or "@import" in page.style.lower():
        expect.fail("the style should load nothing: no url(…), no @import.")
    if squeezed(page.title) != title:
        expect.fail(f"the title should read {title!r}, as plain text; it reads {squeezed(page.title)!r}. (html.escape)")
    _hold_page(page, words, value, picture)
    _hold_raw_picture(submission, title)
    for address in ("https://example.org/a.png", "picture.png", "//example.org/a.png"):
        for source in (f"text ![caption]({address}) text", f"![caption][one]\n\n[one]: {address}\n"):
            with expect.raises_value_error(f"report_html with a picture from {address!r}"):
                submission.report_html(source, title)


def _hold_raw_picture(submission, title: str):
    raw = '<img src="https://example.org/a.png">'
    try:
        page = Document(_text(submission.report_html(f"Some {raw} here.\n", title), "report_html"))
    except StudentError as error:
        if error.kind != "ValueError":
            raise
        expect.fail(f"{raw} in the Markdown is HTML, and should show as text; it was taken for a picture.")
    if page.live or raw not in page.text:
        expect.fail(f"{raw} in the Markdown is HTML, and should show as text.")


def _hold_page(page: Document, words: list[str], value: float, picture: str):
    if words[1] not in page.sections or words[5] not in page.sections:
        expect.fail(f"the headings of the report should be headings of the page: <h2>{words[1]}</h2>.")
    section = page.sections[words[1]]
    if [words[3], f"{value:.4f}"] not in [[squeezed(cell) for cell in row] for row in section.rows()]:
        expect.fail('the tables of the report should be tables of the page: plugins=["table"].')
    if (words[4], picture) not in section.images:
        expect.fail("the figures of the report should be in the page, with their captions and addresses as they were.")
    for wanted in (f'<script>alert("{words[6]}")</script>', f'<b onclick="x()">{words[7]}</b>', "3 < 4 & 5"):
        if wanted not in squeezed(page.text):
            expect.fail(
                f"what looks like HTML in the Markdown should show as text: {wanted!r} cannot be read on the page. (escape=True)"
            )
