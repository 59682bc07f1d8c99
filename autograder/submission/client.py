"""The asking side: a submission's classes as if they were here, with every network call answered and recorded here.

    sampler = submission.DDPMSampler(model, schedule)     # built in the submission's process
    x_s = sampler.ddpm_step(x_t, 500)                     # run there; its calls of `model` come back here
    problems = submission.health_check(sampler)           # plain functions work too

`Submission` is the same object for both ways of running: `connect` speaks to a forked worker over a socket, `local`
calls a namespace of this process (for `check(...)` in a notebook). Values are encoded and decoded either way, so a
check sees the same things.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from autograder.submission.server import Server, exception_for
from autograder.submission.wire import (
    TUPLE,
    Channel,
    Handle,
    Malformed,
    Reference,
    ScheduleReference,
    Unsendable,
    decode,
    encode,
    printable,
)
from difflab.schedule import NoiseSchedule

__all__ = ["ContractBroken", "Missing", "Network", "StudentError", "Submission", "SubmissionDied", "SubmissionTimeout"]

MAX_CALLS = 20_000  # of networks and functions of the grader's, in one check; none needs more than a few hundred


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


class Network:
    """Base of the networks on the grader's side that a check passes to a submission.

    `dtype` names the dtype of its parameters, `methods` what the submission may call. Methods answer with values of
    the wire; a ValueError, RuntimeError or torch.OutOfMemoryError is raised again in the student's code.
    """

    dtype = "float32"
    methods: frozenset[str] = frozenset({"forward"})

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, grad_enabled: bool, autocast: str | None = None
    ) -> torch.Tensor:
        """Predicted noise for x [B, C, H, W] at timesteps t [B]; `autocast` is the dtype in force, if any."""
        raise NotImplementedError


class _Function:
    """A plain function on the grader's side: a clock, a counter."""

    methods = frozenset({"call"})

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def call(self, args: list, kwargs: dict[str, Any]) -> Any:
        return self.function(*args, **kwargs)


class _Transport(Protocol):
    def exchange(self, request: dict, answer: Callable[[int, str, list], Any]) -> dict: ...


class Submission:
    """What a notebook defines: `submission.Name(...)` builds a class or calls a function; values come back plain."""

    def __init__(self, transport: _Transport):
        self._transport = transport
        self._referred: list[tuple[Any, Any]] = []  # (what the check passed, what answers for it)

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

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(None, name, args, kwargs)

    def set(self, target: _RemoteObject, name: str, value: Any) -> None:
        """Replace an attribute of an object in the submission's process: a network that fails, a broken table."""
        self._call(target._handle, name, (value,), {}, replace=True)

    def _call(
        self, target: Handle | None, name: str, args: tuple, kwargs: dict[str, Any], replace: bool = False
    ) -> Any:
        request = {
            "object": None if target is None else target.id,
            "name": name,
            "set": replace,
            "args": [self._pack(a) for a in args],
            "kwargs": {key: self._pack(a) for key, a in kwargs.items()},
        }
        reply = self._transport.exchange(request, self._answer)
        if not isinstance(reply, dict):
            raise SubmissionDied("the submission's process answered out of turn")
        if "missing" in reply:
            raise Missing(
                f"{printable(str(reply['missing']), 100)} is not defined; run the cell that defines it, "
                "or bring it back from the original notebook"
            )
        if "error" in reply:
            error = reply["error"]
            if not (isinstance(error, list) and len(error) == 3 and all(isinstance(part, str) for part in error)):
                raise SubmissionDied("the submission's process answered out of turn")
            if error[0] == "Unsendable":
                raise ContractBroken(f"{name} returned something unexpected: {printable(error[1], 1000)}")
            kind, message, where = (printable(part, limit) for part, limit in zip(error, (100, 1000, 200)))
            raise StudentError(kind, message, where, call=name)
        if "result" not in reply:
            raise SubmissionDied("the submission's process answered out of turn")
        changed, shared = reply.get("changed", []), reply.get("shared", False)
        if not (isinstance(changed, list) and isinstance(shared, bool)):
            raise SubmissionDied("the submission's process answered out of turn")
        if changed:
            raise ContractBroken(
                f"{name} changed its argument {_argument_name(changed[0])} in place; the caller still needs it: "
                "work on a new tensor (x = x + y instead of x += y)"
            )
        if shared:
            raise ContractBroken(
                f"{name} returned a list whose tensors share memory, so that one overwrites the other; "
                "append a new tensor (or .clone()) at every step"
            )
        result = reply["result"]
        if target is None and name[:1].isupper() and not isinstance(result, Handle):
            raise ContractBroken(f"{name} gave a {type(result).__name__} in place of an object; is it still a class?")
        return _RemoteObject(self, result) if isinstance(result, Handle) else result

    def _pack(self, value: Any) -> Any:
        if isinstance(value, _RemoteObject):
            return value._handle
        if isinstance(value, NoiseSchedule):
            return ScheduleReference(value.betas64)
        if isinstance(value, tuple):
            return {TUPLE: [self._pack(item) for item in value]}
        if isinstance(value, list):
            return [self._pack(item) for item in value]
        if isinstance(value, dict):
            return {key: self._pack(item) for key, item in value.items()}
        if isinstance(value, Network):
            return Reference(self._refer(value, value), "model", value.dtype)
        if callable(value):
            return Reference(self._refer(value, _Function(value)), "function")
        return value

    def _refer(self, value: Any, answering: Any) -> int:
        for identity, (known, _) in enumerate(self._referred):
            if known is value:
                return identity
        self._referred.append((value, answering))
        return len(self._referred) - 1

    def _answer(self, identity: int, method: str, args: list) -> Any:
        """Answer a call that comes out of the student's code: only of what was passed in, only its listed methods."""
        if not (type(identity) is int and 0 <= identity < len(self._referred)):
            raise ValueError("there is nothing of that number to call")
        answering = self._referred[identity][1]
        if method not in answering.methods:
            raise ValueError(f"the network has no method {str(method)[:50]!r}")
        return getattr(answering, method)(*args)


class _RemoteObject:
    """An object in the submission's process; attributes are its methods."""

    def __init__(self, submission: Submission, handle: Handle):
        self._submission, self._handle = submission, handle

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._submission._call(self._handle, name, args, kwargs)


def _argument_name(argument: Any) -> str:
    return f"number {argument + 1}" if type(argument) is int else printable(str(argument), 50)


class _SocketTransport:
    def __init__(self, channel: Channel, deadline: float):
        self.channel, self.deadline = channel, deadline
        self.started, self.calls = time.monotonic(), 0

    def exchange(self, request: dict, answer: Callable[[int, str, list], Any]) -> dict:
        try:
            self.channel.send(request, self.deadline)
            while True:
                reply = self.channel.receive(self.deadline)
                if not (isinstance(reply, dict) and "ask" in reply):
                    return reply
                call = reply["ask"]
                if not (isinstance(call, list) and len(call) == 3 and isinstance(call[2], list)):
                    raise Malformed("a call is not described properly")
                self.calls += 1
                if self.calls > MAX_CALLS:
                    raise Malformed(f"more than {MAX_CALLS:,} network calls in one check")
                self.channel.send(_outcome(answer, call), self.deadline)
        except TimeoutError:
            raise SubmissionTimeout(f"no answer after {self.deadline - self.started:.0f} s: an endless loop?") from None
        except (EOFError, OSError):
            raise SubmissionDied("the process ended before it answered (os._exit, or out of memory?)") from None
        except Malformed as error:
            raise SubmissionDied(f"the process sent something that is not an answer: {error}") from None


def _outcome(answer: Callable[[int, str, list], Any], call: list) -> dict[str, Any]:
    """What a call gives: its value, or the exception that the student's code is to see."""
    try:
        return {"return": answer(*call)}
    except Exception as error:  # whatever a call from the student's code provokes is its own to handle
        return {"raise": [type(error).__name__, str(error)]}


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
        outcome = decode(encode(_outcome(self.answer, decode(encode([identity, method, args])))))
        if "raise" in outcome:
            raise exception_for(*outcome["raise"])
        return outcome["return"]
