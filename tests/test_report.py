"""Does a report get what it needs from the machine, and nothing that only this machine has?"""

import base64
import re

import matplotlib.pyplot as plt
import torch

from autograder.report import CheckResult, Report
from difflab import report


def test_environment_is_plain_text_without_paths():
    found = report.environment("cpu")
    assert found["PyTorch"] == torch.__version__ and "(cpu)" in found["device"]
    assert all(isinstance(value, str) and value for value in found.values())
    assert not any("/home" in value or "\n" in value for value in found.values())


def test_data_uri_holds_the_picture():
    figure, _ = plt.subplots()
    kind, data = report.data_uri(figure).split(",")
    plt.close(figure)
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")


def test_plain_text_leaves_the_pictures_out(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    report.show_report("## Results\n\n![time](data:image/png;base64,AAAA)")
    assert shown[0]["text/markdown"].endswith("AAAA)") and shown[0]["text/plain"].endswith("![time](picture)")


def test_a_report_as_a_table():
    """Is what is missing first, and is what a submission says shown as text?"""
    checks = [
        CheckResult("one", 2, 2, "passed", "", 0.1),
        CheckResult("two", 0, 3, "todo", "TODO: two is still to be written", 0.1),
        CheckResult("three", 0, 0.5, "failed", "three: 1 | 2 <b>* [a](http://x) `c` x_t", 0.1),
    ]
    notes = ["cell 3: ValueError: <img src=x> \n# ![a](javascript:b) | `c`"]
    graded = Report("lab", 2, 5.5, 8, checks, sandbox="bwrap", device="cpu", notes=notes)
    title, _, said, *rows, _, note = graded.to_markdown().splitlines()
    assert title == "## lab: 2 of 5.5 automatic points" and said.startswith(
        "8 more are given by a person. Sandbox: bwrap"
    )
    assert [row.split(" | ")[1:3] for row in rows[3:]] == [["three", "0 / 0.5"], ["two", "0 / 3"], ["one", "2 / 2"]]
    assert all(row.count("|") == 5 for row in rows[1:])
    assert note.startswith("* cell 3") and not re.search(r"[<>\[\]|`!]", note[1:] + rows[3].split(" | ")[3][:-1])
