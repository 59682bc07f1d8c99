"""What may cross between the grader and a submission, and how: length-prefixed msgpack with a handful of extensions.

Both sides use this module, but only the grader's reading of it is a security boundary: `decode` builds nothing but
numbers, strings, lists, dicts, tensors of listed dtypes, figures and handles, whatever bytes arrive. Nothing is ever
unpickled or evaluated.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch

__all__ = [
    "Channel",
    "Figure",
    "Handle",
    "Malformed",
    "Reference",
    "ScheduleReference",
    "TUPLE",
    "decode",
    "encode",
    "printable",
]

MAX_MESSAGE = 64 * 2**20  # bytes; a trajectory of 1000 states of 16 digits is 50 MB
MAX_DEPTH = 16
MAX_ITEMS = 200_000  # numbers outside tensors, lists and dicts of one message

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
TUPLE = "()"  # {TUPLE: [...]} in a request is a tuple: contracts promise one for a shape, and programs may rely on it
_TENSOR, _HANDLE, _REFERENCE, _SCHEDULE, _FIGURE = 1, 2, 3, 4, 5


class Malformed(Exception):
    """A message that does not follow the rules of this module."""


class Unsendable(TypeError):
    """A value that cannot cross: the text says which and what was expected."""


@dataclass(frozen=True)
class Handle:
    """An object that lives in the submission's process."""

    id: int
    class_name: str


@dataclass(frozen=True)
class Reference:
    """Something that lives in the grader's process, a network or a function; the submission calls it over the wire."""

    id: int
    kind: str  # "model" or "function"
    dtype: str = "float32"  # of a model's parameters


@dataclass(frozen=True)
class ScheduleReference:
    """A `NoiseSchedule`, by its betas (float64), from which both sides compute the same tables."""

    betas: torch.Tensor


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure: its picture, and the images drawn in its axes, in order."""

    png: bytes
    images: list[torch.Tensor]


def printable(text: str, limit: int) -> str:
    """At most `limit` characters, none of which moves a terminal's cursor or sets its title."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])


# -- values ------------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """Pack a value.

    Raises:
        Unsendable: if it holds anything this module does not list, or is too large or too deep.
    """
    try:
        data = msgpack.packb(_pack(value, 0), use_bin_type=True)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, Unsendable):
            raise
        raise Unsendable(f"a value cannot be sent ({type(error).__name__}: {str(error)[:200]})") from None
    if len(data) > MAX_MESSAGE:
        raise Unsendable(f"the value has {len(data) / 2**20:.0f} MB; at most {MAX_MESSAGE // 2**20} MB can be sent")
    return data


def _pack(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise Unsendable(f"the value is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        if not -(2**63) <= value < 2**64:
            raise Unsendable("an integer is beyond 64 bits")
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value)
    if isinstance(value, np.ndarray):
        return _pack_tensor(torch.from_numpy(np.ascontiguousarray(value)))
    if isinstance(value, (list, tuple, range)):
        return [_pack(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_pack_key(key): _pack(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Handle):
        return msgpack.ExtType(_HANDLE, msgpack.packb([value.id, value.class_name]))
    if isinstance(value, Reference):
        return msgpack.ExtType(_REFERENCE, msgpack.packb([value.id, value.kind, value.dtype]))
    if isinstance(value, ScheduleReference):
        return msgpack.ExtType(_SCHEDULE, value.betas.double().numpy().tobytes())
    if isinstance(value, Figure):
        return msgpack.ExtType(_FIGURE, msgpack.packb([value.png, [_pack(image, depth + 1) for image in value.images]]))
    raise Unsendable(f"a {type(value).__name__} cannot be sent; expected tensors, numbers, strings, lists or dicts")


def _pack_key(key: Any) -> Any:
    if isinstance(key, torch.Tensor) and key.ndim == 0:
        key = key.item()
    if isinstance(key, (str, int, float, np.integer, np.floating)):
        return key.item() if isinstance(key, np.generic) else key
    raise Unsendable(f"a dictionary key of type {type(key).__name__} cannot be sent; expected strings or numbers")


def _pack_tensor(tensor: torch.Tensor) -> msgpack.ExtType:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise Unsendable(
            f"a {tensor.layout} tensor of dtype {name} cannot be sent; expected a dense float or integer one"
        )
    plain = tensor.detach().cpu().contiguous()
    if name == "bfloat16":
        plain = plain.view(torch.int16)
    shape = list(tensor.shape)
    return msgpack.ExtType(_TENSOR, msgpack.packb([name, shape, plain.numpy().tobytes()], use_bin_type=True))


def decode(data: bytes) -> Any:
    """Unpack a value.

    Raises:
        Malformed: for anything `encode` would not have written.
    """
    reader = _Reader()
    try:
        value = reader.unpack(data, ext_hook=reader.extension)
        _check_depth(value, 0)
        return value
    except Malformed:
        raise
    except Exception as error:  # msgpack raises many kinds, some of them ours through ext_hook
        raise Malformed(f"the message cannot be read ({type(error).__name__}: {str(error)[:100]})") from None


def _check_depth(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH + 4:
        raise Malformed("the message is nested too deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int, float)):
                raise Malformed("a dictionary key is neither a string nor a number")
            _check_depth(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_depth(item, depth + 1)
    elif isinstance(value, (msgpack.Timestamp, msgpack.ExtType)):
        raise Malformed("the message holds a value of unknown type")


class _Reader:
    """Reads one message, counting what it holds: a megabyte of empty maps would become a hundred of Python objects."""

    def __init__(self) -> None:
        self.items = 0

    def unpack(self, data: bytes, **options: Any) -> Any:
        """The value in `data`, extensions included."""
        return msgpack.unpackb(
            data, list_hook=self.count, object_hook=self.count, strict_map_key=False, raw=False,
            max_ext_len=MAX_MESSAGE, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, **options,
        )  # fmt: skip

    def count(self, container: list | dict) -> list | dict:
        """Called with every list and map when it is complete."""
        self.items += 1 + len(container)
        if self.items > MAX_ITEMS:
            raise Malformed(f"the message holds more than {MAX_ITEMS:,} values")
        return container

    def parts(self, data: bytes, length: int, **options: Any) -> list:
        """The parts of an extension."""
        value = self.unpack(data, **options)
        if not isinstance(value, list) or len(value) != length:
            raise Malformed("an extension has the wrong number of parts")
        return value

    def extension(self, code: int, data: bytes) -> Any:
        """A tensor, handle, reference, schedule or figure."""
        if code == _TENSOR:
            return self.tensor(code, data)
        if code == _HANDLE:
            identity, class_name = self.parts(data, 2)
            if type(identity) is not int or not isinstance(class_name, str):
                raise Malformed("a handle is not described properly")
            return Handle(identity, class_name[:100])
        if code == _REFERENCE:
            identity, kind, dtype_name = self.parts(data, 3)
            if type(identity) is not int or kind not in ("model", "function") or dtype_name not in DTYPES:
                raise Malformed("a reference is not described properly")
            return Reference(identity, kind, dtype_name)
        if code == _SCHEDULE:
            if not data or len(data) % 8 or len(data) > 8 * 100_000:
                raise Malformed("a schedule is not described properly")
            return ScheduleReference(torch.frombuffer(bytearray(data), dtype=torch.float64))
        if code == _FIGURE:
            png, images = self.parts(data, 2, ext_hook=self.tensor)  # tensors only, so that figures cannot nest
            if not isinstance(png, bytes) or not isinstance(images, list):
                raise Malformed("a figure is not described properly")
            if not all(isinstance(image, torch.Tensor) for image in images):
                raise Malformed("a figure holds something other than images")
            return Figure(png, images)
        raise Malformed(f"unknown extension {code}")

    def tensor(self, code: int, data: bytes) -> torch.Tensor:
        """A tensor, and nothing else."""
        if code != _TENSOR:
            raise Malformed("a figure holds something other than images")
        name, shape, raw = self.parts(data, 3)
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None or not isinstance(raw, bytes) or not isinstance(shape, list) or len(shape) > 16:
            raise Malformed("a tensor is not described properly")
        if not all(type(n) is int and 0 <= n <= MAX_MESSAGE for n in shape):
            raise Malformed("a tensor has an impossible shape")
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise Malformed(f"a tensor of shape {shape} and dtype {name} came with {len(raw)} bytes")
        if dtype is torch.bool and raw.strip(b"\x00\x01"):
            raise Malformed("a boolean tensor holds other bytes than 0 and 1")
        if not raw:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


# -- frames ------------------------------------------------------------------------------------------------------


class Channel:
    """Messages over a socket, each a 4-byte length and that many bytes.

    Args:
        sock: a connected stream socket.
        budget: how many bytes may be received in all; None for any number.
    """

    def __init__(self, sock: socket.socket, budget: int | None = None):
        self.socket, self.budget = sock, budget

    def send(self, message: Any, deadline: float | None = None) -> None:
        """Send a value.

        Raises:
            Unsendable: if `encode` refuses it; nothing was sent then.
            TimeoutError: past the deadline (a `time.monotonic()` value).
            OSError: if the other side is gone.
        """
        data = encode(message)
        self._set_timeout(deadline)
        self.socket.sendall(struct.pack(">I", len(data)) + data)

    def receive(self, deadline: float | None = None) -> Any:
        """Wait for a value.

        Raises:
            Malformed, TimeoutError, EOFError (the other side is gone).
        """
        (length,) = struct.unpack(">I", self._read(4, deadline))
        if length > MAX_MESSAGE:
            raise Malformed(
                f"a message of {length / 2**20:.0f} MB was announced; at most {MAX_MESSAGE // 2**20} may be sent"
            )
        if self.budget is not None:
            self.budget -= length
            if self.budget < 0:
                raise Malformed("more was sent than one check has room for")
        return decode(self._read(length, deadline))

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def _read(self, count: int, deadline: float | None) -> bytes:
        buffer = bytearray()
        while len(buffer) < count:
            self._set_timeout(deadline)
            try:
                part = self.socket.recv(min(count - len(buffer), 2**20))
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other side has closed the connection")
            buffer += part
        return bytes(buffer)

    def _set_timeout(self, deadline: float | None) -> None:
        if deadline is None:
            self.socket.settimeout(None)
            return
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self.socket.settimeout(remaining)
