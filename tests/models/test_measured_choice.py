"""Choices that are measured once and then kept."""

import pytest

from moe_hf.models import measured_choice
from moe_hf.models.measured_choice import kept_choice, largest_faster


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe_hf"


def never():
    raise AssertionError("measured")


def test_a_choice_is_measured_once_and_kept(folder):
    assert kept_choice("this", lambda: 4, unmeasured=1) == 4
    assert kept_choice("this", never, unmeasured=1) == 4
    assert kept_choice("that", lambda: 0, unmeasured=1) == 0
    assert sorted(file.name.split("-")[0] for file in folder.iterdir()) == ["that", "this"]


def test_a_file_without_a_choice_is_written_anew(folder):
    kept_choice("this", lambda: 4, unmeasured=1)
    (file,) = folder.iterdir()
    file.write_text("")
    assert kept_choice("this", lambda: 8, unmeasured=1) == 8
    assert kept_choice("this", never, unmeasured=1) == 8


def test_of_two_processes_the_first_one_chooses(folder):
    def measure():
        assert kept_choice("this", lambda: 2, unmeasured=1) == 2
        return 4

    assert kept_choice("this", measure, unmeasured=1) == 2


def test_without_a_writable_folder_nothing_is_measured(folder):
    folder.write_text("a file where the folder would be")
    assert kept_choice("this", never, unmeasured=1) == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [({2: 1, 4: 1, 8: 1}, 8), ({2: 1, 4: 3, 8: 1}, 2), ({2: 3, 4: 1, 8: 1}, 0), ({2: 2, 4: 1, 8: 1}, 0)],
)
def test_the_largest_faster_size_comes_before_the_first_slower_one(seconds, expected, monkeypatch):
    """The second function takes 2 s. Of each function's calls, every other one takes 10 s longer."""
    now = [0.0]
    monkeypatch.setattr(measured_choice.time, "perf_counter", lambda: now[0])

    def taking(duration):
        calls = []

        def function():
            calls.append(1)
            now[0] += duration + 10 * (len(calls) % 2)

        return function

    assert largest_faster((2, 4, 8), lambda size: (taking(seconds[size]), taking(2))) == expected
