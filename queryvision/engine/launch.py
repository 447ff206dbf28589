"""Starts the processes of one machine, each with a device of its own, and ends with them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.queues import SimpleQueue
from types import FrameType
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, ProcessRaisedException, start_processes

from queryvision.allocation import tune_allocation
from queryvision.errors import ConfigError, QueryVisionError

GRACE = 60.0  # s that the others have to end, once a process has


def launch(function: Callable[..., Any], given: Mapping[str, Any], devices: int) -> Any:
    """Runs a function in several processes that find each other as those of torchrun do.

    Args:
        function: of a module that can be imported.
        given: its keyword arguments.
        devices: number of processes.

    Returns:
        What it returned in the first one.

    Raises:
        ConfigError: there are fewer GPUs.
        QueryVisionError: that of the process which failed first; `Stopped` if a signal came and all have saved.
    """
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise ConfigError(f"train.devices = {devices}: there are {torch.cuda.device_count()} GPUs here")
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    arguments = (function, dict(given), devices, _free_port(), told)
    # What is not `spawn` would share locks and GPU contexts with this process.
    processes = start_processes(_child, arguments, devices, join=False, start_method="spawn")  # type: ignore[no-untyped-call]
    try:
        with _passing_on(processes):
            while not processes.join(timeout=1, grace_period=GRACE):
                pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        raise _reason(told, error) from None
    if told.empty():
        raise KeyboardInterrupt
    return told.get()


def _child(rank: int, function: Callable[..., Any], given: dict[str, Any], devices: int, port: int, told: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // devices))
    tune_allocation()
    code = 0
    try:
        result = function(**given)
        if rank == 0:
            told.put(result)
    except QueryVisionError as error:
        told.put(error)
        code = getattr(error, "code", 2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: others may wait for this process, and threads of the connections sometimes abort an orderly end


def _reason(told: SimpleQueue[Any], error: ProcessExitedException | ProcessRaisedException) -> Exception:
    """What a process said before it ended; else how it ended, or its traceback, which is a bug of ours."""
    while not told.empty():
        reason = told.get()
        if isinstance(reason, QueryVisionError):
            return reason
    if isinstance(error, ProcessRaisedException):
        return RuntimeError(str(error))
    name = f" by {error.signal_name}" if error.signal_name else f" with exit code {error.exit_code}"
    return QueryVisionError(f"process {error.error_index} ended{name}; go on from the last checkpoint with --resume")


@contextlib.contextmanager
def _passing_on(processes: ProcessContext) -> Iterator[None]:
    """Signals end the processes, not the one that waits for them.

    A terminal sends Ctrl-C to all of them; a second SIGINT would end them at once, a SIGTERM more does nothing.
    """

    def tell(number: int, frame: FrameType | None) -> None:
        for process in processes.processes:
            process.terminate()

    try:
        before = {name: signal.signal(name, tell) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # outside of the main thread
        yield
        return
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
