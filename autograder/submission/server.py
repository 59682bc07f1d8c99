"""The answering side: builds the student's classes, calls their methods, sends back what they return.

Runs where the student's code runs: inside the worker when grading, inside the notebook's kernel for `check(...)`.
Nothing it says is trusted; it only carries answers.
"""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autograder.submission.wire import TUPLE, Figure, Handle, Reference, ScheduleReference
from difflab.schedule import NoiseSchedule

__all__ = ["RemoteModel", "Server", "describe", "exception_for"]


Ask = Callable[[int, str, list], Any]  # (id of what is asked, its method, arguments) -> answer


class RemoteModel(nn.Module):
    """Stands in for a network that lives with the grader: every call is asked over the wire.

    It has one parameter, never used, so that `next(model.parameters()).device` and `.dtype` work as on a real network.
    """

    def __init__(self, reference: Reference, ask: Ask):
        super().__init__()
        self._reference, self._ask = reference, ask
        self.placeholder = nn.Parameter(torch.zeros((), dtype=getattr(torch, reference.dtype)))

    def __deepcopy__(self, _memo: dict) -> RemoteModel:
        return self  # a student's private copy asks the same network

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predicted noise, as the grader's network sees it."""
        kind = x.device.type if isinstance(x, torch.Tensor) else "cpu"
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        mode = [torch.is_grad_enabled(), str(autocast) if autocast else None]
        # Under autocast a network of convolutions answers in the lower precision.
        return self._ask(self._reference.id, "forward", [x, t, *mode]).to(device=x.device, dtype=autocast)

    def encode(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The first half of `forward`, as on `difflab.unet.UNet`."""
        h, skips = self._ask(self._reference.id, "encode", [x, t])
        return h, skips

    def decode(self, h: torch.Tensor, skips: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        """The second half of `forward`."""
        return self._ask(self._reference.id, "decode", [h, list(skips), t])


class Server:
    """Serves requests against a namespace.

    Args:
        namespace: where the student's classes are looked up.
        ask: how a call of something on the grader's side gets there.
        student_file: maps a code file name in a traceback to "cell 12", or None for files that are not the student's.
    """

    def __init__(
        self,
        namespace: dict[str, Any],
        ask: Ask,
        student_file: Callable[[str], str | None] = lambda name: None,
    ):
        self.namespace, self.ask, self.student_file = namespace, ask, student_file
        self.objects: dict[int, Any] = {}
        self.references: dict[int, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; whatever the student's code raises is described, not raised."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return self._answer(request)
        except (Exception, SystemExit) as error:
            return {"error": describe(error, self.student_file)}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        arguments = [self._unpack(a) for a in request["args"]]
        keywords = {name: self._unpack(a) for name, a in request["kwargs"].items()}
        if request["object"] is None:
            if request["name"] not in self.namespace:
                return {"missing": request["name"]}
            function = self.namespace[request["name"]]
            if isinstance(function, type):
                self.objects[len(self.objects)] = function(*arguments, **keywords)
                return {"result": Handle(len(self.objects) - 1, function.__name__)}
        else:
            instance = self.objects[request["object"]]
            if request.get("set"):
                setattr(instance, request["name"], arguments[0])
                return {"result": None}
            if not hasattr(instance, request["name"]):
                return {"missing": f"{type(instance).__name__}.{request['name']}"}
            function = getattr(instance, request["name"])
        given = [*arguments, *keywords.values()]
        names = [*range(len(arguments)), *keywords]
        before = [a.clone() if isinstance(a, torch.Tensor) else None for a in given]
        result = function(*arguments, **keywords)
        changed = [
            name
            for name, old, new in zip(names, before, given)
            if old is not None and not (old.shape == new.shape and torch.equal(old.nan_to_num(), new.nan_to_num()))
        ]
        return {"result": self._pack(result), "changed": changed, "shared": _shared_memory(result)}

    def _unpack(self, value: Any) -> Any:
        if isinstance(value, Handle):
            return self.objects[value.id]
        if isinstance(value, Reference):
            if value.id not in self.references:
                self.references[value.id] = (
                    RemoteModel(value, self.ask)
                    if value.kind == "model"
                    else lambda *args, **kwargs: self.ask(value.id, "call", [list(args), kwargs])
                )
            return self.references[value.id]
        if isinstance(value, ScheduleReference):
            return NoiseSchedule(value.betas)
        if isinstance(value, list):
            return [self._unpack(item) for item in value]
        if isinstance(value, dict) and value.keys() == {TUPLE}:
            return tuple(self._unpack(item) for item in value[TUPLE])
        if isinstance(value, dict):
            return {key: self._unpack(item) for key, item in value.items()}
        return value

    def _pack(self, value: Any) -> Any:
        """Figures become pictures; everything else is left to the wire, which says what it cannot carry."""
        from matplotlib.figure import Figure as MatplotlibFigure

        if isinstance(value, MatplotlibFigure):
            return _pack_figure(value)
        if isinstance(value, (list, tuple)):
            return [self._pack(item) for item in value]
        if isinstance(value, dict):
            return {key: self._pack(item) for key, item in value.items()}
        return value


def describe(error: BaseException, student_file: Callable[[str], str | None]) -> list[str]:
    """[kind, message, where]: `where` is the innermost line of the student's own code, as "cell 12, line 3"."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if student_file(frame.filename):
            where = f"{student_file(frame.filename)}, line {frame.lineno}"
    name = type(error).__name__
    if isinstance(error, ValueError) and name != "ValueError":
        return ["ValueError", f"{name}: {error}"[:1000], where]  # the contract asks for a ValueError: any kind will do
    return [name[:100], str(error)[:1000], where]


def exception_for(kind: str, message: str) -> Exception:
    """The exception by which something on the grader's side answered a call, as the student's code sees it."""
    kinds = {"OutOfMemoryError": torch.OutOfMemoryError, "RuntimeError": RuntimeError}
    return kinds.get(kind, ValueError)(message)


def _pack_figure(figure: Any) -> Figure:
    from matplotlib import pyplot as plt

    images = [
        torch.as_tensor(image.get_array().filled(float("nan"))).double()
        for axes in figure.axes
        for image in axes.get_images()
    ]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    plt.close(figure)
    return Figure(buffer.getvalue(), images)


def _shared_memory(result: Any) -> bool:
    """Do two tensors of one returned list (a trajectory, say) lie at one address? Slices of one storage do not."""
    if not isinstance(result, (list, tuple)):
        return False
    addresses = [item.data_ptr() for item in result if isinstance(item, torch.Tensor) and item.numel()]
    return len(set(addresses)) < len(addresses) or any(_shared_memory(item) for item in result)
