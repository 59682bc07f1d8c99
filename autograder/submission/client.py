"""The asking side: a submission's classes as if they were here, with every network call answered and recorded here.

    sampler = submission.DDPMSampler(model, schedule)     # built in the submission's process
    x_s = sampler.ddpm_step(x_t, 500)                     # run there; its calls of `model` come back here

`Submission` is the same object for both ways of running: `connect` speaks to a forked worker over a socket, `local`
calls a namespace of this process (for `check(...)` in a notebook). Values are encoded and decoded either way, so a
check sees the same things.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from autograder.submission.server import Server
from autograder.submission.wire import (
    Channel,
    Handle,
    Malformed,
    ModelReference,
    ScheduleReference,
    Unsendable,
    decode,
    encode,
)
from difflab.schedule import NoiseSchedule

__all__ = ["ContractBroken", "Missing", "Network", "StudentError", "Submission", "SubmissionDied", "SubmissionTimeout"]


class StudentError(Exception):
    """The student's code raised. `kind` is the exception's type, `where` e.g. "cell 12, line 3"."""

    def __init__(self, kind: str, message: str, where: str, call: str):
        super().__init__(f"{call} raised {kind}: {message}" + (f" ({where})" if where else ""))
        self.kind, self.message, self.where, self.call = kind, message, where, call


class Missing(Exception):
    """A class or method the check needs is not defined."""


class ContractBroken(Exception):
    """A rule that holds for every call was broken: an argument changed in place, a value of the wrong kind."""


class SubmissionTimeout(Exception):
    """The submission did not answer in time."""


class SubmissionDied(Exception):
    """The submission's process ended, or sent something that is not a message."""


class Network(Protocol):
    """A network on the grader's side, as a check passes it to a submission."""

    dtype: str

    def forward(self, x: torch.Tensor, t: torch.Tensor, grad_enabled: bool) -> torch.Tensor:
        """Predicted noise for x [B, C, H, W] at timesteps t [B]."""


class _Transport(Protocol):
    def exchange(self, request: dict, answer: Callable[[int, str, list], Any]) -> dict: ...


class Submission:
    """The classes of a submission: `submission.ClassName(...)` builds one, its methods return plain values."""

    def __init__(self, transport: _Transport):
        self._transport = transport
        self._networks: list[Network] = []

    @classmethod
    def connect(cls, channel: Channel, deadline: float) -> Submission:
        """Speak to a worker's child over `channel`, at most until `deadline` (`time.monotonic()`)."""
        return cls(_SocketTransport(channel, deadline))

    @classmethod
    def local(
        cls, namespace: dict[str, Any], student_file: Callable[[str], str | None] = lambda name: None
    ) -> Submission:
        """Use the classes in `namespace`, in this process."""
        return cls(_LocalTransport(namespace, student_file))

    def __getattr__(self, name: str) -> Callable[..., _RemoteObject]:
        if name.startswith("_"):
            raise AttributeError(name)

        def construct(*args: Any, **kwargs: Any) -> _RemoteObject:
            handle = self._call({"do": "construct", "name": name}, name, args, kwargs)
            if not isinstance(handle, Handle):
                raise SubmissionDied("the submission's process answered out of turn")
            return _RemoteObject(self, handle, name)

        return construct

    def _call(self, request: dict[str, Any], label: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        request["args"] = [self._lower(a) for a in args]
        request["kwargs"] = {name: self._lower(a) for name, a in kwargs.items()}
        reply = self._transport.exchange(request, self._answer_network)
        if not isinstance(reply, dict):
            raise SubmissionDied("the submission's process answered out of turn")
        if "missing" in reply:
            raise Missing(
                f"{str(reply['missing'])[:100]} is not defined; run the cell that defines it, "
                "or bring it back from the original notebook"
            )
        if "error" in reply:
            error = reply["error"]
            if not (isinstance(error, list) and len(error) == 3 and all(isinstance(part, str) for part in error)):
                raise SubmissionDied("the submission's process answered out of turn")
            if error[0] == "Unsendable":
                raise ContractBroken(f"{label} returned something unexpected: {error[1]}")
            raise StudentError(*error, call=label)
        if "result" not in reply:
            raise SubmissionDied("the submission's process answered out of turn")
        changed = reply.get("changed")
        if changed:
            raise ContractBroken(
                f"{label} changed its argument {_argument_name(changed)} in place; the caller still needs it: "
                "work on a new tensor (x = x + y instead of x += y)"
            )
        if reply.get("shared"):
            raise ContractBroken(
                f"{label} returned a list whose tensors share memory, so that one overwrites the other; "
                "append a new tensor (or .clone()) at every step"
            )
        return reply["result"]

    def _lower(self, value: Any) -> Any:
        if isinstance(value, _RemoteObject):
            return value._handle
        if isinstance(value, NoiseSchedule):
            return ScheduleReference(value.betas64)
        if hasattr(value, "forward") and hasattr(value, "dtype"):
            if not any(value is network for network in self._networks):
                self._networks.append(value)
            identity = next(i for i, network in enumerate(self._networks) if network is value)
            return ModelReference(identity, value.dtype)
        return value

    def _answer_network(self, identity: int, method: str, args: list) -> Any:
        if not (type(identity) is int and 0 <= identity < len(self._networks)) or method != "forward":
            raise ValueError("the network has no such method")
        if len(args) != 3 or not isinstance(args[0], torch.Tensor) or not isinstance(args[1], torch.Tensor):
            raise ValueError("the network takes two tensors: model(x, t) with x [B, C, H, W] and t [B]")
        return self._networks[identity].forward(args[0], args[1], bool(args[2]))


class _RemoteObject:
    """An object in the submission's process; attributes are its methods."""

    def __init__(self, submission: Submission, handle: Handle, label: str):
        self._submission, self._handle, self._label = submission, handle, label

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            request = {"do": "call", "object": self._handle.id, "name": name}
            return self._submission._call(request, name, args, kwargs)

        return call


def _argument_name(changed: Any) -> str:
    first = changed[0] if isinstance(changed, list) and changed else "?"
    return f"number {first + 1}" if type(first) is int else str(first)[:50]


class _SocketTransport:
    def __init__(self, channel: Channel, deadline: float):
        self.channel, self.deadline = channel, deadline
        self.started = time.monotonic()

    def exchange(self, request: dict, answer: Callable[[int, str, list], Any]) -> dict:
        try:
            self.channel.send(request, self.deadline)
            while True:
                reply = self.channel.receive(self.deadline)
                if not (isinstance(reply, dict) and "network" in reply):
                    return reply
                call = reply["network"]
                if not (isinstance(call, list) and len(call) == 3 and isinstance(call[2], list)):
                    raise Malformed("a network call is not described properly")
                try:
                    self.channel.send({"return": answer(*call)}, self.deadline)
                except ValueError as error:  # a call that breaks the network's contract: the student's code hears why
                    self.channel.send({"raise": str(error)}, self.deadline)
        except TimeoutError:
            raise SubmissionTimeout(f"no answer after {self.deadline - self.started:.0f} s: an endless loop?") from None
        except (EOFError, OSError):
            raise SubmissionDied("the process ended before it answered (os._exit, or out of memory?)") from None
        except Malformed as error:
            raise SubmissionDied(f"the process sent something that is not an answer: {error}") from None


class _LocalTransport:
    def __init__(self, namespace: dict[str, Any], student_file: Callable[[str], str | None]):
        self.server = Server(namespace, self._ask, student_file)
        self.answer: Callable[[int, str, list], Any] | None = None

    def exchange(self, request: dict, answer: Callable[[int, str, list], Any]) -> dict:
        self.answer = answer
        reply = self.server.answer(decode(encode(request)))
        try:
            return decode(encode(reply))
        except Unsendable as error:
            return {"error": ["Unsendable", str(error), ""]}

    def _ask(self, identity: int, method: str, args: list) -> Any:
        return decode(encode(self.answer(identity, method, decode(encode(args)))))
