"""A tiny data set, a tiny checkpoint, and the command line in a process of its own or in this one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, Call, Done, Run

from queryvision import cli
from queryvision.data.scenes import make_scenes


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=12, val=6, size=64)


@pytest.fixture
def scenes(drawn_once: Path, tmp_path: Path) -> Path:
    """A copy of a drawn data set that a test may spoil."""
    return Path(shutil.copytree(drawn_once, tmp_path / "scenes"))


@pytest.fixture
def spoil(scenes: Path) -> Callable[..., Path]:
    """Changes an annotation file of the copy in place; gives the data set."""

    def change(edit: Callable[[dict[str, Any]], object], *splits: str) -> Path:
        for split in splits or ("train",):
            file = scenes / "annotations" / f"instances_{split}.json"
            content = json.loads(file.read_text())
            edit(content)
            file.write_text(json.dumps(content))
        return scenes

    return change


@pytest.fixture
def qv() -> Run:
    """Runs the command line in a process of its own."""

    def run(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "queryvision.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qv", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        text = capfd.readouterr()
        return Done(int(end.value.code or 0), text.out, text.err)

    return run


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """Runs a command that must end with code 2 and one line on stderr, which holds all of `says`; gives the line."""

    def run(*words: object, says: str | tuple[str, ...]) -> str:
        done = call(*words)
        assert done.code == 2, done
        assert len(done.err.splitlines()) == 1 and done.err.startswith("qv: "), done.err
        for text in (says,) if isinstance(says, str) else says:
            assert text in done.err, done.err
        return done.err

    return run


@pytest.fixture(scope="session")
def trained(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a few steps; not to be changed."""
    output = tmp_path_factory.mktemp("runs")
    words = [
        "train",
        "--data",
        str(drawn_once),
        *TINY,
        "--steps",
        "12",
        "--lr",
        "1e-3",
        "--output",
        str(output),
        "--name",
        "tiny",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["qv", *words, "--devices", "1", "--set", "evaluation.pictures=1", "--set", "train.warmup=0"]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return output / "detection" / "tiny"


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run that a test may spoil, as `<tmp_path>/runs/detection/tiny`."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "detection" / "tiny"))
