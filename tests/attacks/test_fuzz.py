"""Malformed input of any kind is the submission's failure, never the grader's crash. Inputs are made by hypothesis."""

from __future__ import annotations

import contextlib
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path

import msgpack
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from autograder.checks import CheckFailed, expect
from autograder.checks.runner import _verdict
from autograder.notebooks import CannotGrade, grade_id, is_graded, read_notebook, release_path, sanitise, to_run
from autograder.submission.client import Submission
from autograder.submission.process import CellResult, _read_cell
from autograder.submission.wire import (
    DTYPES,
    Figure,
    Handle,
    Malformed,
    Reference,
    ScheduleReference,
    Unsendable,
    decode,
    encode,
)

LAB = "lab05_sampling"
# The same inputs every time, so that a red test is red again; `make soak` tries many others. Nothing is kept on disk.
EXAMPLES = int(os.environ.get("DIFFLAB_FUZZ_EXAMPLES", "0"))
fuzz = settings(max_examples=EXAMPLES or 300, derandomize=not EXAMPLES, database=None, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

# -- the wire ------------------------------------------------------------------------------------------------------

numbers = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
tensors = st.builds(
    lambda dtype, shape: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 4), max_size=4),
)
values = st.recursive(
    numbers | tensors,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=10,
)  # fmt: skip
# What msgpack can say, extensions with arbitrary contents included
wild = st.recursive(
    numbers | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(numbers | st.binary(max_size=4), inner, max_size=4)
        | st.builds(lambda code, value: msgpack.ExtType(code, msgpack.packb(value)), st.integers(0, 127), inner)
        | st.builds(
            lambda name, shape, raw: msgpack.ExtType(1, msgpack.packb([name, shape, raw])),
            st.sampled_from([*DTYPES, "object", ""]),
            st.lists(st.integers(-2, 2**40), max_size=4) | inner,
            st.binary(max_size=16) | inner,
        )
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and (a == b or a != a)


def plain(value) -> bool:
    """Nothing but what the wire's description lists."""
    if isinstance(value, (list, dict)):
        keys, items = (value, value.values()) if isinstance(value, dict) else ([], value)
        return all(isinstance(key, (str, int, float)) for key in keys) and all(map(plain, items))
    kinds = (bool, int, float, str, bytes, torch.Tensor, Handle, Reference, ScheduleReference, Figure)
    return value is None or type(value) in kinds


@fuzz
@given(values)
def test_what_is_sent_arrives(value):
    assert same(value, decode(encode(value)))


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(Malformed):
        assert plain(decode(data))


@fuzz
@given(wild)
def test_any_message_is_read_or_refused(value):
    try:
        data = msgpack.packb(value)
    except (OverflowError, ValueError, TypeError):
        return
    with contextlib.suppress(Malformed):
        assert plain(decode(data))


@fuzz
@given(values, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5), st.booleans())
def test_damaged_messages_are_read_or_refused(value, damage, cut):
    data = bytearray(encode(value))
    for place, byte in damage:
        data[place % len(data)] = byte
    if cut:
        del data[damage[0][0] % len(data) :]
    with contextlib.suppress(Malformed):
        assert plain(decode(bytes(data)))


@fuzz
@given(st.recursive(
    st.builds(object) | st.complex_numbers() | st.sets(st.integers()) | st.integers(2**64, 2**70) | st.binary()
    | numbers
    | st.sampled_from([torch.zeros(2, dtype=torch.complex64), torch.zeros(3).to_sparse(), torch.zeros(2, device="meta"),
                       np.array([object()]), np.array(["x"]), np.zeros(2, dtype=complex), np.float32(1)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.tuples(numbers) | numbers, inner, max_size=3),
    max_leaves=6,
))  # fmt: skip
def test_what_cannot_be_sent_is_said(value):
    try:
        decode(encode(value))
    except Unsendable as error:
        assert str(error) and "\n" not in str(error)


# -- replies -------------------------------------------------------------------------------------------------------


class _Saying:
    """A transport that gives one reply, whatever is asked."""

    def __init__(self, reply):
        self.reply = reply

    def exchange(self, _request, _answer):
        return self.reply


parts = st.fixed_dictionaries(
    {},
    optional={
        "result": values | st.builds(Handle, st.integers(), st.text()),
        "error": values | st.lists(st.text(), min_size=3, max_size=3),
        "missing": values,
        "changed": values,
        "shared": values,
        "ask": values,
    },
)


@fuzz
@given(parts | values)
def test_any_reply_is_a_value_or_the_submissions_failure(reply):
    try:
        result = Submission(_Saying(reply)).add_noise(torch.zeros(1))
        expect.tensor(result, "the answer", (1,))
    except Exception as error:
        status, hint = _verdict(error)
        assert status != "error" and hint, error


@fuzz
@given(values | st.fixed_dictionaries({"cell": st.just("cell 1") | values}, optional={
    "outputs": values | st.lists(values | st.fixed_dictionaries(
        {"output_type": st.sampled_from(["stream", "error", "display_data", "execute_result", "x"])},
        optional={"text": values, "name": values, "data": values | st.dictionaries(
            st.sampled_from(["text/plain", "image/png", "text/html"]), values), "ename": values, "evalue": values,
            "traceback": values},
    ), max_size=4),
    "error": values | st.lists(st.text(), min_size=3, max_size=3),
}))  # fmt: skip
def test_any_report_of_a_cell_is_outputs_or_refused(reply):
    try:
        cell = _read_cell(reply, "cell 1")
    except Malformed:
        return
    assert isinstance(cell, CellResult)
    for output in cell.outputs:
        nbformat.validate(nbformat.from_dict(output), ref="output", version=4, version_minor=5)


@fuzz
@given(values)
def test_comparisons_judge_any_value(value):
    for judge in (
        lambda: expect.tensor(value, "it", (2, 2), torch.float32),
        lambda: expect.tensors(value, "it", 2),
        lambda: expect.truth(value, "it"),
    ):
        try:
            judge()
        except CheckFailed as error:
            assert str(error)


# -- notebooks ------------------------------------------------------------------------------------------------------

RELEASE = nbformat.read(release_path(LAB), as_version=4)
NAMES = [name for cell in RELEASE.cells if (name := grade_id(cell))]
IDS = [cell["id"] for cell in RELEASE.cells]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
metadata = anything | st.fixed_dictionaries({}, optional={
    "tags": st.lists(st.sampled_from(["demo", "skip-execution", "raises-exception"])) | anything,
    "nbgrader": anything | st.fixed_dictionaries({"grade_id": st.sampled_from(NAMES) | anything}, optional={
        "grade": anything, "points": anything, "locked": anything, "solution": anything, "task": anything}),
})  # fmt: skip
data = st.dictionaries(st.sampled_from(["image/png", "text/plain", "text/html", "image/svg+xml"]), anything)
output = st.fixed_dictionaries(
    {"output_type": st.sampled_from(["stream", "display_data", "execute_result", "error"])},
    optional={"text": anything, "data": anything | data},
)
extras = {
    "metadata": metadata,
    "outputs": anything | st.lists(anything | output),
    "id": st.sampled_from([*IDS, "x", "x-0"]) | anything,
    "attachments": anything,
    "execution_count": anything,
}
kinds = st.sampled_from(["code", "markdown", "raw"])
sources = st.text() | st.lists(st.text())
cells = anything | st.fixed_dictionaries(
    {"cell_type": kinds | anything, "source": anything | sources}, optional=extras
)  # fmt: skip
good_cells = st.fixed_dictionaries({"cell_type": kinds, "source": sources}, optional=extras)
notebooks = st.fixed_dictionaries(
    {
        "nbformat": st.just(4) | anything,
        "cells": st.lists(good_cells, min_size=1, max_size=8) | st.lists(cells) | anything,
    },
    optional={"nbformat_minor": anything, "metadata": anything},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / f"{LAB}.ipynb"


@fuzz
@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_read_or_refused_in_a_line(path, data):
    path.write_bytes(data)
    with pytest.raises(CannotGrade) as refused:
        read_notebook(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


@fuzz
@given(notebooks)
def test_any_notebook_comes_back_on_the_rails(path, raw):
    path.write_text(json.dumps(raw), encoding="utf-8")
    try:
        submitted = read_notebook(path)
    except CannotGrade as refused:
        assert "\n" not in str(refused)
        return
    clean = sanitise(submitted, RELEASE)
    nbformat.validate(clean)
    graded = {grade_id(cell): cell for cell in clean.cells if is_graded(cell)}
    original = {grade_id(cell): cell for cell in RELEASE.cells if is_graded(cell)}
    assert {name: cell.source for name, cell in graded.items()} == {name: c.source for name, c in original.items()}
    assert [grade_id(c) for c in clean.cells if grade_id(c)].count("add_noise") == 1
    own = {json.dumps(cell.metadata, sort_keys=True) for cell in RELEASE.cells}
    assert all(json.dumps(cell.metadata, sort_keys=True) in own | {"{}"} for cell in clean.cells)
    assert not any("attachments" in cell for cell in clean.cells)
    assert clean.metadata == RELEASE.metadata
    assert len({label for _, label, _ in to_run(clean)}) == len(to_run(clean))
    path.write_text(nbformat.writes(clean), encoding="utf-8")
    assert sanitise(read_notebook(path), RELEASE) == clean


class _Live(HTMLParser):
    """Collects what a browser would act upon."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "img", "iframe", "svg", "style", "link", "object", "embed", "form", "base", "meta"):
            self.found.append(tag)
        for name, value in attributes:
            scheme = (value or "").strip().lower()
            if name.startswith("on") or (name in ("href", "src") and not scheme.startswith(("http", "mailto:", "#"))):
                self.found.append(f"{name}={value}")


PIECES = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=x>", "<a href='javascript:x'>", "<!-- ",
    "<details>", "<javascript:x>", "&lt;", "<", ">", "-->", "[x](", "[x][y]", "\n\n[y]: ", "![a](", "](", "]: ", "]:",
    "![a](https://ok.example/a.png)", "javascript:alert(1)", "JaVaScRiPt&colon;x", "&#106;avascript:x", "vbscript:x",
    "data:text/html,x", "https://ok.example", "#a", "mailto:a@b.c", "\\href{javascript:x}{y}", "\\require{action}", "(",
    ")", "[", "]", "!", "\\", "\\[", "`", "```\n", "$", "$$", "|a|b|\n|-|-|\n|", "- ", "> ", "* ", "_", "\n", "\n\n",
    " ",
    "\t", "\u200b", "\0",
]  # fmt: skip
pieces = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(fuzz, max_examples=EXAMPLES or 1000)
@given(pieces)
def test_no_markdown_of_a_student_comes_to_life(path, text):
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": "markdown", "id": "own", "metadata": {}, "source": text},
        {"cell_type": "raw", "id": "raw", "metadata": {}, "source": text}]}))  # fmt: skip
    clean = sanitise(read_notebook(path), RELEASE)
    for cell in clean.cells:
        if cell["id"] in ("own", "raw"):
            live = _Live()
            live.feed(markdown2html_mistune(cell.source))
            assert live.found == [], (cell.source, live.found)
            assert "\\href" not in cell.source and "\\require" not in cell.source
