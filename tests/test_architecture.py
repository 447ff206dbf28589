"""The rules of the house: imports point one way, and neither the core nor the engine names a task."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "queryvision"
TASKS = ("detection", "instance", "panoptic", "keypoints", "grounding", "tracking", "lanes")
BLIND = ["head.py", "task.py", "matching.py", "criterion.py", "model", "engine"]


def sources(folder: Path) -> list[Path]:
    """Python files, the linked folders apart."""
    found = [folder] if folder.suffix == ".py" else sorted(folder.rglob("*.py"))
    return [p for p in found if "tasks" not in p.relative_to(ROOT).parts[1:]]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def import_errors(files: list[Path]) -> list[str]:
    return [f"{p.relative_to(ROOT)} imports {n}" for p in files for n in imported(p) if re.match(r"(queryvision\.)?tasks\b", n)]


def naming_errors(files: list[Path]) -> list[str]:
    """Words of a task in code (names, strings that are no documentation), where nobody may know one."""
    errors = []
    for path in files:
        tree = ast.parse(path.read_text())
        documentation = {
            id(d) for n in ast.walk(tree) if isinstance(n, ast.Expr) for d in [n.value] if isinstance(d, ast.Constant)
        }
        for node in ast.walk(tree):
            words = []
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                words = re.findall(r"[a-z]+", node.value.lower())
            else:
                found = [
                    str(getattr(node, kind)) for kind in ("id", "attr", "arg", "name", "asname") if getattr(node, kind, None)
                ]
                words = re.findall(r"[a-z]+", " ".join(found).lower())
            errors += [f"{path.relative_to(ROOT)}:{node.lineno} names '{w}'" for w in words if w in TASKS]
    return errors


def test_queryvision_imports_no_task() -> None:
    assert import_errors(sources(CORE)) == []


def test_one_place_resolves_a_task_name() -> None:
    places = [p.relative_to(CORE).as_posix() for p in sources(CORE) if "queryvision.tasks" in p.read_text().split('"""', 2)[-1]]
    assert places == ["registry.py"]


@pytest.mark.parametrize("part", BLIND)
def test_core_and_engine_name_no_task(part: str) -> None:
    files = sources(CORE / part)
    assert files, f"{part} is gone: mend this test"
    assert naming_errors(files) == []


def test_the_rules_catch_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "queryvision" / "bad.py"
    bad.parent.mkdir()
    bad.write_text('"""Speaks of detection."""\nfrom queryvision.tasks.detection import BoxHead\n\nkind = "panoptic"\n')
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert import_errors([bad])
    assert naming_errors([bad]) == ["queryvision/bad.py:4 names 'panoptic'"]


def test_links_are_links_and_tasks_guard_themselves() -> None:
    assert (CORE / "tasks").is_symlink() and (CORE / "configs").is_symlink()
    import sys

    sys.path.insert(0, str(ROOT))
    try:
        sys.modules.pop("tasks", None)
        with pytest.raises(ImportError, match="queryvision.tasks"):
            __import__("tasks")
    finally:
        sys.path.remove(str(ROOT))


def test_heads_of_a_task_stand_in_a_file_each() -> None:
    for path in sorted((ROOT / "tasks").glob("*/*.py")):
        heads = re.findall(r"^class (\w+)\(Head\)", path.read_text(), re.M)
        assert len(heads) <= 1, f"{path} holds {heads}"
