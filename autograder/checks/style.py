"""How the code reads, as far as a program can tell: from the text of the notebook's cells, which is not run here."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence

from pyflakes import messages
from pyflakes.checker import Checker

from autograder.checks import NotYet, expect

__all__ = ["hold_style"]

# Magics whose cell runs as if they were not there; IPython would make a string of it.
TRANSPARENT = re.compile(r"\A\s*%%(time|capture)\b.*\n")
UNTIDY = (messages.UnusedVariable, messages.UnusedImport, messages.UndefinedName, messages.UndefinedLocal)


def hold_style(
    submission, rng, sources: Sequence[str], exercises: Mapping[str, set[str]], quick_checks: Mapping[str, Callable]
) -> None:
    """Completed methods have docstrings, no unused or undefined names, no bare `except:`.

    Args:
        submission, rng, sources: the fixtures of a check.
        exercises: class -> its graded methods; "" for functions.
        quick_checks: some of them -> their checks, to tell code that works from code that only looks tidy.

    Raises:
        NotYet: if less than half is written, or most of it does not work.
        CheckFailed: if something is untidy.
    """
    tree = _parse(sources)
    completed = {name: node for name, node in _definitions(tree, exercises).items() if not _is_stub(node)}
    total = sum(map(len, exercises.values()))
    if 2 * len(completed) < total:
        raise NotYet(
            f"style is judged when half of the {total} graded methods are written; {len(completed)} are so far"
        )
    quick = [check for name, check in quick_checks.items() if any(full.split(".")[-1] == name for full in completed)]
    working = sum(_passes(check, submission, rng) for check in quick)
    if 2 * working < len(quick) or not quick:
        raise NotYet(f"style is judged when most of the code works; of {len(quick)} quick checks {working} pass so far")
    problems = [problem for name, node in completed.items() for problem in _problems(name, node)]
    for message in Checker(tree, builtins={"get_ipython", "display", "In", "Out"}).messages:
        name = _method_at(completed, message.lineno)
        if name and isinstance(message, UNTIDY):
            problems.append(f"{name}: {message.message % message.message_args}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        expect.fail(f"{problems[0]}{more}.")


def _parse(sources) -> ast.Module:
    """All cells that can be read as Python, as one module."""
    from IPython.core.inputtransformer2 import TransformerManager

    lines: list[str] = []
    for source in sources:
        try:
            text = TransformerManager().transform_cell(TRANSPARENT.sub("", source))
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        lines += text.splitlines()
    return ast.parse("\n".join(lines))


def _definitions(tree: ast.Module, exercises: Mapping[str, set[str]]) -> dict[str, ast.FunctionDef]:
    """The graded functions, "Class.method" -> its last definition: in the class, by @add_to_class, or assigned."""
    found: dict[str, ast.FunctionDef] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}": item for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            classes = [
                decorator.args[0].id
                for decorator in node.decorator_list
                if isinstance(decorator, ast.Call)
                and getattr(decorator.func, "id", "") == "add_to_class"
                and decorator.args
                and isinstance(decorator.args[0], ast.Name)
            ]
            found[f"{classes[0]}.{node.name}" if classes else node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {name: found[function] for name, function in _assigned(node) if function in found}
    wanted = {f"{cls}.{name}" if cls else name for cls, names in exercises.items() for name in names}
    return {name: node for name, node in found.items() if name in wanted}


def _assigned(node: ast.Assign) -> list[tuple[str, str]]:
    """Of `Class.method = function`, one or several: ("Class.method", "function")."""
    pairs = []
    for target in node.targets:
        several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
        pairs += zip(target.elts, node.value.elts) if several else [(target, node.value)]
    return [
        (f"{to.value.id}.{to.attr}", value.id)
        for to, value in pairs
        if isinstance(to, ast.Attribute) and isinstance(to.value, ast.Name) and isinstance(value, ast.Name)
    ]


def _is_stub(node: ast.FunctionDef) -> bool:
    """Does it still raise NotImplementedError, or hold nothing but a docstring?"""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return not body or any(
        isinstance(part, ast.Raise) and "NotImplementedError" in ast.unparse(part) for part in ast.walk(node)
    )


def _problems(name: str, node: ast.FunctionDef) -> list[str]:
    problems = []
    if not (ast.get_docstring(node) or "").strip():
        problems.append(f"{name} has lost its docstring")
    if any(isinstance(part, ast.ExceptHandler) and part.type is None for part in ast.walk(node)):
        problems.append(f"{name}: a bare `except:` swallows everything, the stop button too; name the error")
    return problems


def _method_at(completed: dict[str, ast.FunctionDef], line: int) -> str | None:
    return next((name for name, node in completed.items() if node.lineno <= line <= node.end_lineno), None)


def _passes(check, submission, rng) -> bool:
    try:
        check(submission, rng)
    except expect.NOT_WORKING:
        return False
    return True
