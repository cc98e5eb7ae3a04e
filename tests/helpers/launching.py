"""Starts the train scripts as a user does, with a launcher, on the data of `write_config`."""

import json
import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180


def launch(*command):
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=TIMEOUT):
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def script(folder, output, world_size, *options):
    rows = str(8 // world_size)
    options = ("--gating", "softmax_top_k", "--dropout", 0, "--logging_steps", 1, "--learning_rate", 0.02, *options)
    arguments = ("--per_device_train_batch_size", rows, "--output_dir", f"{folder}/{output}", *options)
    return (ROOT / "scripts" / "train_lm.py", f"{folder}/config.yaml", *arguments)


def losses(folder, output):
    state = json.loads((folder / output / "trainer_state.json").read_text(encoding="utf-8"))
    return [log["loss"] for log in state["log_history"] if "loss" in log]
