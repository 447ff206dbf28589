"""A run's folder: of each run its own, and its settings whole whatever happens."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from queryvision.config import Config, load_config
from queryvision.engine.checkpoint import save_checkpoint
from queryvision.engine.run_log import RunLog
from queryvision.errors import CheckpointError, ConfigError
from queryvision.run_folder import HELD, claim_folder, holding, newest_run, take_folder


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: writing fails as on a full disk, perhaps after a part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def begun(config: Config) -> Path:
    """The folder of a run that was killed before it wrote its settings."""
    folder = claim_folder(config)
    (folder / HELD).touch()
    return folder


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    config = load_config("detection", None, {"output": str(tmp_path), "name": "run"})
    with pytest.raises(ConfigError, match="there is no run .*detection/run;"):
        newest_run(config)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(begun, [config] * 8))
    assert {path.name for path in made} == {"run", *(f"run-{number}" for number in range(2, 9))}
    assert newest_run(config).name == "run-8"


def test_the_newest_run_has_the_highest_number_whatever_was_deleted(tmp_path: Path) -> None:
    config = load_config("detection", None, {"output": str(tmp_path), "name": "run"})
    first, second, third = (begun(config) for _ in range(3))
    shutil.rmtree(second)
    assert newest_run(config) == third
    fourth = begun(config)
    assert fourth.name == "run-4" and newest_run(config) == fourth
    for folder in (first, third):
        shutil.rmtree(folder)
    assert newest_run(config) == fourth and begun(config).name == "run-5"
    for number in range(6, 11):
        assert begun(config).name == f"run-{number}"
    assert newest_run(config).name == "run-10", "numbers, not texts"


def test_a_number_may_belong_to_the_name_of_another_run(tmp_path: Path) -> None:
    config, dated = (load_config("detection", None, {"output": str(tmp_path), "name": n}) for n in ("run", "run-2024"))
    take_folder(claim_folder(dated), dated)
    for name in ("run-02", "run-1", "run-x", "run-3-4", "runs-9", "7", "other-8"):
        (tmp_path / "detection" / name).mkdir()
    (tmp_path / "detection" / "run-6").touch()
    with pytest.raises(ConfigError, match="there is no run .*detection/run;"):
        newest_run(config)
    first = claim_folder(config)
    take_folder(first, config)
    assert first.name == "run" and newest_run(config) == first
    (tmp_path / "detection" / "run-640").mkdir()  # somebody's own
    take_folder(claim_folder(config), config)
    assert newest_run(config).name == "run-2" and newest_run(dated).name == "run-2024"


def test_settings_are_whole_on_a_full_disk(tmp_path: Path) -> None:
    take_folder(tmp_path, load_config("detection", None, {"train.seed": 1}))
    with full_after(100), pytest.raises(ConfigError, match=r"cannot write .*config\.yaml \("):
        take_folder(tmp_path, load_config("detection", None, {"train.seed": 2}))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["seed"] == 1


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("queryvision.engine.files.os.replace", killed)
        patch.setattr("pathlib.Path.unlink", lambda *_: None)
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path / "last.pt", {})
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine.tmp").touch()
    take_folder(tmp_path, load_config("detection"))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "mine.tmp"}


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    """And however it ends, the next one may."""
    code = (
        "import sys, time; from pathlib import Path; from queryvision.run_folder import holding\n"
        "with holding(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run trains in this folder"), holding(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with holding(tmp_path), pytest.raises(ConfigError, match="another run trains"), holding(tmp_path / ".." / tmp_path.name):
        pass
    with holding(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
def test_records_do_not_end_a_run(tmp_path: Path, capsys: Any) -> None:
    """Where there is no room the run is told so once; later rows are whole, and other errors are not hidden."""
    log = RunLog(tmp_path, 9)
    log.row(1, {"loss": 1.0})
    whole = (tmp_path / "metrics.csv").read_text()
    with full_after(len(whole) + 3):
        log.row(2, {"loss": 2.0})
        log.row(3, {"loss": 3.0, "val/AP": 0.5})
        log.status(3, 3.0, 1e-4)
        with pytest.raises(CheckpointError, match="cannot write"):
            try:
                save_checkpoint(tmp_path / "last.pt", {"model": {"x": torch.zeros(999)}})
            finally:
                log.close()
    assert (tmp_path / "metrics.csv").read_text() == whole
    assert sum("are not complete" in line for line in capsys.readouterr().out.splitlines()) == 1
    log.row(4, {"loss": 4.0})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "1,1.0", "4,4.0"]


def test_a_folder_that_cannot_be_written_at_the_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ConfigError, match="cannot write into"):
        RunLog(tmp_path, 9)
