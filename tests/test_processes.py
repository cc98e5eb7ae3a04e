"""The processes of tests/helpers/processes.py meet on a port that no other process can take."""

import os
import socket

import pytest
from processes import Run


def own_port() -> int:
    return int(os.environ["MASTER_PORT"])


def test_the_port_is_held_without_the_processes():
    run = Run(1, own_port)
    [port] = run.join()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
