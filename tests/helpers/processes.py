"""Runs a function on several processes that communicate through gloo, with a time limit.

The processes are forked from a server that has already imported the libraries: a start takes 0.1 s instead of 10 s.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore

TIMEOUT = 150  # seconds
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["moe_hf.training.lm", "moe_hf.training.translation", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
)


def start(function, *arguments) -> multiprocessing.Process:
    """Starts a separate process, without a group, for `function(*arguments)`; its exit code is 1 after an error."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


class Run:
    """Processes that run `function(*arguments)`, with RANK, related variables and SHARED_FOLDER in the environment."""

    def __init__(self, num_processes: int, function, *arguments):
        # The store is bound here, to any free port: a port that is only looked up could be taken before its use.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory()
        self.started = time.monotonic()
        self.processes = [
            _context.Process(
                target=_run, args=(self._folder.name, rank, num_processes, self._store.port, function, arguments)
            )
            for rank in range(num_processes)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def join(self, timeout: float = TIMEOUT) -> list:
        """Returns each process's result, or its exception as text.

        Raises:
            TimeoutError: a process took longer than the limit; all processes are then killed.
        """
        hanging = []
        for process in self.processes:
            process.join(max(0.1, self.started + timeout - time.monotonic()))
            if process.is_alive():
                hanging.append(process.name)
        for process in self.processes:
            process.kill()
            process.join()
        results = []
        for rank in range(len(self.processes)):
            file = Path(self._folder.name, f"{rank}.pkl")
            results.append(pickle.loads(file.read_bytes()) if file.exists() else "killed")
        self._folder.cleanup()
        if hanging:
            raise TimeoutError(f"{hanging} still ran after {timeout} seconds; results: {results}")
        return results


def on_processes(num_processes: int, function, *arguments, timeout: float = TIMEOUT) -> list:
    """Returns the results of `function(*arguments)` on each process; raises if any process raised."""
    results = Run(num_processes, function, *arguments).join(timeout)
    errors = [f"process {rank}: {result}" for rank, result in enumerate(results) if isinstance(result, str)]
    assert not errors, "\n".join(errors)
    return results


def errors_of_processes(num_processes: int, function, *arguments, timeout: float = TIMEOUT) -> list[str]:
    """Returns, as text, the errors with which `function(*arguments)` ends on every process."""
    results = Run(num_processes, function, *arguments).join(timeout)
    for rank, result in enumerate(results):
        assert isinstance(result, str), f"process {rank} ended without an error"
    return results


def _run(folder, rank, num_processes, port, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["SHARED_FOLDER"] = folder
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    # The file gets its name only after it is complete.
    file = Path(folder, f"{rank}.tmp")
    file.write_bytes(pickle.dumps(result))
    file.rename(file.with_suffix(".pkl"))
    os._exit(0)  # a normal exit would wait for the connections of a broken group
