"""What crosses between grader and submission, and what must not."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import time

import msgpack
import numpy as np
import pytest
import torch

from autograder.submission.client import Submission
from autograder.submission.wire import (
    MAX_MESSAGE,
    Channel,
    Figure,
    Handle,
    Malformed,
    Reference,
    ScheduleReference,
    Unsendable,
    decode,
    encode,
)


def _round(value):
    return decode(encode(value))


@pytest.mark.parametrize(
    "value", [None, True, 3, -(2**63), 2.5, math.inf, "ᾱ", [1, [2.0, None]], {"a": 1, 0.5: [2], 3: {}}]
)
def test_plain_values_come_back(value):
    assert _round(value) == value


def test_a_tuple_arrives_as_a_tuple_and_comes_back_as_a_list():
    submission = Submission.local({"extend": lambda shape, more: [type(more).__name__, (1, *shape) + shape[:1]]})
    assert submission.extend((2, 3), [4]) == ["list", [1, 2, 3, 2]]


def test_tuples_and_ranges_come_back_as_lists():
    assert _round((1, range(3))) == [1, [0, 1, 2]]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 1, 4, 4)])
def test_tensors_come_back_bit_for_bit(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    back = _round({"x": [tensor]})["x"][0]
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)


def test_views_and_arrays_are_sent_as_what_they_show():
    base = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(_round(base.T[1:]), base.T[1:])
    assert torch.equal(_round(np.arange(3)), torch.arange(3))
    assert _round(np.float32(0.5)) == 0.5
    assert _round([np.float64(1) > 0]) == [True]


def test_references_come_back():
    assert _round(Handle(3, "DDIMSampler")) == Handle(3, "DDIMSampler")
    assert _round(Reference(1, "model", "float64")) == Reference(1, "model", "float64")
    betas = torch.linspace(1e-4, 0.02, 10, dtype=torch.float64)
    assert torch.equal(_round(ScheduleReference(betas)).betas, betas)
    figure = _round(Figure(b"png", [torch.ones(2, 2)]))
    assert figure.png == b"png" and torch.equal(figure.images[0], torch.ones(2, 2))


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, lambda: 0, torch.randn(2, dtype=torch.complex64), torch.eye(3).to_sparse(),
     torch.empty(2, device="meta"), 2**70, {(1, 2): 3}, b"bytes"],
)  # fmt: skip
def test_other_values_are_refused_by_name(value):
    with pytest.raises(Unsendable, match="expected|beyond"):
        encode(value)


def test_too_deep_is_refused_on_both_sides():
    nested: list = []
    for _ in range(40):
        nested = [nested]
    with pytest.raises(Unsendable, match="deep"):
        encode(nested)
    with pytest.raises(Malformed):
        decode(msgpack.packb(nested))


def _ext(code, *parts):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb(list(parts), use_bin_type=True)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        _ext(1, "float32", [2], b"1234"),  # bytes for one number, shape for two
        _ext(1, "float32", [-1], b""),
        _ext(1, "float32", [2**40, 2**40], b""),
        _ext(1, "object", [1], b"12345678"),
        _ext(1, "float32", "4", b"1234"),
        _ext(1, "bool", [1], b"\x07"),
        _ext(1, "float32"),
        _ext(2, "0", "x"),
        _ext(3, 0, "model", "complex64"),
        _ext(3, 0, "file", "float32"),
        _ext(5, b"png", [1]),
        _ext(42, 1),
        msgpack.packb(msgpack.ExtType(4, b"1234567")),
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb({b"key": 1}, use_bin_type=True),
    ],
)
def test_malformed_bytes_are_named_never_obeyed(data):
    with pytest.raises(Malformed):
        decode(data)


def test_random_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    good = encode({"result": [torch.randn(2, 2), Figure(b"p", [torch.ones(1)]), Handle(1, "a")]})
    for _ in range(3000):
        data = bytearray(good)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        with contextlib.suppress(Malformed):
            decode(bytes(data))


def _pair():
    a, b = socket.socketpair()
    return Channel(a), Channel(b)


def test_messages_arrive_whole_and_in_order():
    one, other = _pair()
    one.send({"x": torch.arange(1000)})
    one.send("second")
    assert torch.equal(other.receive(time.monotonic() + 5)["x"], torch.arange(1000))
    assert other.receive() == "second"


def test_announcing_too_much_is_malformed():
    one, other = _pair()
    one.socket.sendall(struct.pack(">I", MAX_MESSAGE + 1))
    with pytest.raises(Malformed, match="announced"):
        other.receive()


def test_silence_times_out_and_a_closed_end_is_eof():
    one, other = _pair()
    with pytest.raises(TimeoutError):
        other.receive(time.monotonic() + 0.05)
    one.socket.sendall(b"\x00\x00")
    one.close()
    with pytest.raises(EOFError):
        other.receive(time.monotonic() + 5)


def test_what_cannot_be_packed_is_unsendable_not_a_crash():
    for value in ("\ud800", np.array([object()]), {"a": np.array(["x"])}):
        with pytest.raises(Unsendable):
            encode(value)


def test_figures_do_not_nest_and_small_messages_stay_small():
    figure = msgpack.packb(msgpack.ExtType(5, msgpack.packb([b"", []])))
    nested = msgpack.packb(msgpack.ExtType(5, msgpack.packb([b"", [msgpack.unpackb(figure)]])))
    with pytest.raises(Malformed):
        decode(nested)
    with pytest.raises(Malformed, match="values|exceeds"):
        decode(msgpack.packb([{}] * 250_000))
