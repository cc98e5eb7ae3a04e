"""The other processes wait for the first process's preparation, even beyond a collective's time limit."""

import time

import pytest
from processes import errors_of_processes, on_processes
from tiny_runs import write_config

from moe_hf.distributed.waiting import broadcast_from_rank_zero, local_rank_zero_first
from moe_hf.errors import InputError
from moe_hf.training.arguments import MoeTrainingArguments, parse_arguments
from moe_hf.training.lm import train_lm

SECONDS = 60
TIMEOUT, LONGER = 2, 3  # seconds: the process group's limit, and the first process's time


def arguments_of(folder):
    return MoeTrainingArguments(output_dir=str(folder), use_cpu=True, ddp_timeout=TIMEOUT)


def make_once(folder, fails):
    calls = []

    def make():
        calls.append(1)
        if fails:
            raise InputError("no text")
        return "made"

    try:
        made = broadcast_from_rank_zero(make, arguments_of(folder))
    except InputError as error:
        made = f"error: {error}"
    return len(calls), made


@pytest.mark.parametrize(("fails", "made"), [(False, "made"), (True, "error: no text")])
def test_what_the_first_process_makes_or_refuses_is_every_ones(tmp_path, fails, made):
    assert on_processes(2, make_once, tmp_path, fails, timeout=SECONDS) == [(1, made), (0, made)]


def fail_otherwise(folder):
    def make():
        raise RuntimeError("out of disk")

    broadcast_from_rank_zero(make, arguments_of(folder))


def test_an_error_of_another_kind_leaves_no_process_waiting(tmp_path):
    first, second = errors_of_processes(2, fail_otherwise, tmp_path, timeout=SECONDS)
    assert first.startswith("RuntimeError: out of disk") and second


def order_of_the_block(folder):
    args, begun = arguments_of(folder), time.monotonic()
    with local_rank_zero_first(args):
        entered = time.monotonic()
        if args.process_index == 0:
            time.sleep(LONGER)
    return entered - begun, time.monotonic() - begun


def test_the_first_process_goes_through_the_block_first(tmp_path):
    (first, _), (second, _) = on_processes(2, order_of_the_block, tmp_path, timeout=SECONDS)
    assert first < 1 and second >= LONGER - 1


def train_slowly(folder):
    import moe_hf.training.lm as lm

    train_tokenizer = lm.load_or_train_tokenizer
    lm.load_or_train_tokenizer = lambda *args, **kwargs: time.sleep(LONGER) or train_tokenizer(*args, **kwargs)
    options = ["--ddp_timeout", str(TIMEOUT), "--max_steps", "1"]
    train_lm(*parse_arguments([f"{folder}/config.yaml", *options]))


def test_a_tokenizer_that_trains_longer_than_the_groups_timeout_does_not_end_the_run(tmp_path):
    write_config(tmp_path)
    on_processes(2, train_slowly, tmp_path, timeout=SECONDS)
