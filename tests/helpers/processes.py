"""Runs a function on several processes that talk through gloo, and never waits for them without end.

They are forked from a server that has imported the libraries already, which takes a tenth of a second and not ten.
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
    """A process of its own, without a group, that runs `function(*arguments)`; its exit code is 1 after an error."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


class Run:
    """Processes that run `function(*arguments)`, with RANK and its like and SHARED_FOLDER in their environment."""

    def __init__(self, num_processes: int, function, *arguments):
        # Held here, on a port of its own choice: one that was only looked for could be taken before it is used.
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
        """What each process returned, or its exception as text. Those that take longer are killed: TimeoutError."""
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
    """What `function(*arguments)` returns on each process; an error on any of them is one here."""
    results = Run(num_processes, function, *arguments).join(timeout)
    errors = [f"process {rank}: {result}" for rank, result in enumerate(results) if isinstance(result, str)]
    assert not errors, "\n".join(errors)
    return results


def errors_of_processes(num_processes: int, function, *arguments, timeout: float = TIMEOUT) -> list[str]:
    """The errors, as text, that `function(*arguments)` ends with on every process."""
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
    # Named only once it is whole.
    file = Path(folder, f"{rank}.tmp")
    file.write_bytes(pickle.dumps(result))
    file.rename(file.with_suffix(".pkl"))
    os._exit(0)  # the connections of a broken group would be waited for
