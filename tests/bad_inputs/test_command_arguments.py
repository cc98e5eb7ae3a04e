"""Bad arguments of commands other than training: wrong options, values out of range, and empty values."""

import pytest
from bad_inputs import Case, judge


def of_lm(says, command: str, /, *options) -> Case:
    """A case with a trained language model: MODEL, TEXT and OUT among the options are paths."""
    return Case(f"{command} {' '.join(options)}", lambda place: [command, *_filled(place, options, place.lm)], says)


def of_translator(says, command: str, /, *options) -> Case:
    """The same with a trained translation model."""
    return Case(
        f"{command} {' '.join(options)}", lambda place: [command, *_filled(place, options, place.translator)], says
    )


def alone(says, /, *arguments) -> Case:
    """A case that needs no files."""
    return Case(" ".join(arguments), lambda place: list(arguments), says)


def _filled(place, options, model) -> list:
    paths = {"OUT": place / "out"}
    if "MODEL" in options:
        paths["MODEL"] = model()
    if "TEXT" in options:
        paths["TEXT"] = place.file("text.txt", "a b c\n" * 50)
    return [paths.get(option, option) for option in options]


# The refusal comes before the model is loaded: "nowhere" does not exist.
PARSED = [
    *(
        alone((f"{option}=", value, "at least 1"), "translate", "nowhere", f"--{option}", value)
        for option, value in [
            ("num_beams", "0"),
            ("num_beams", "2.5"),
            ("num_return_sequences", "-1"),
            ("tokens_per_batch", "0"),
            ("buffer_lines", "0"),
            ("buffer_lines", "many"),
            ("buffer_lines", "9" * 30),
        ]
    ),
    alone(("num_beams=1000000", "at most 1000"), "translate", "nowhere", "--num_beams", "1000000"),
    alone(("num_beams=1000000", "at most 1000"), "evaluate-translation", "a", "b", "c", "--num_beams", "1000000"),
    *(
        alone((f"{option}=", value), command, *files, f"--{option}", value)
        for command, files in [("translate", ["nowhere"]), ("evaluate-translation", ["nowhere", "a", "b"])]
        for option, value in [
            ("length_alpha", "nan"),
            ("coverage_beta", "inf"),
            ("length_alpha", "1e30"),
            ("length_penalty", "1e30"),
            ("length_penalty", "nan"),
            ("length_alpha", "-1"),
        ]
    ),
    *(
        alone((f"{option}=", value, "at least 1"), "evaluate-lm", "nowhere", "a", f"--{option}", value)
        for option, value in [("window_length", "0"), ("batch_size", "-2"), ("window_length", "1e3")]
    ),
    *(
        alone((f"{option}=", value), "report", "nowhere", "a", f"--{option}", value)
        for option, value in [
            ("max_tokens", "0"),
            ("num_contexts", "-1"),
            ("context_width", "-1"),
            ("num_contexts", "4611686018427387904"),
            ("batch_size", "0"),
            ("window_length", "x"),
        ]
    ),
    alone(("last=0", "at least 1"), "average", "run", "out", "--last", "0"),
    alone(("last='ten'", "whole number"), "average", "run", "out", "--last", "ten"),
    *(
        alone((f"{option}=", value), "upcycle", "nowhere", "out", "--num_experts", "8", f"--{option}", value)
        for option, value in [
            ("gate_std", "nan"),
            ("gate_std", "-1"),
            ("expert_std", "inf"),
            ("seed", "-1"),
            ("seed", "18446744073709551616"),
            ("slices", "0"),
            ("num_experts_per_tok", "0"),
            ("num_expert_groups", "0"),
            ("num_groups_per_tok", "-1"),
            ("num_experts", "-4"),
            ("gating", "hard"),
        ]
    ),
    *(
        alone((f"{option}=", value), "prune", "nowhere", "a", "out", "--keep", "2", f"--{option}", value)
        for option, value in [("keep", "0"), ("keep", "half"), ("num_experts_per_tok", "0"), ("method", "cut")]
    ),
    *(
        alone((f"{option}=", value), "plan", f"--{option}", value)
        for option, value in [
            ("devices", "0"),
            ("flops", "nan"),
            ("bandwidth", "0"),
            ("memory", "-1"),
            ("memory", "inf"),
            ("tokens", "0"),
            ("value_bytes", "0"),
            ("optimizer", "sgd"),
            ("num_experts", "0"),
            ("hidden_size", "2.5"),
        ]
    ),
    alone(("num_experts_per_tok=9", "num_experts=4"), "plan", "--num_experts", "4", "--num_experts_per_tok", "9"),
    alone(("nowhere.yaml",), "plan", "nowhere.yaml"),
    alone(("configs", "empty"), "table", ""),
    alone(("nowhere",), "table", "nowhere"),
    alone(("max_shard_size='big'",), "push", "nowhere", "me/model", "--max_shard_size", "big"),
    alone(("max_shard_size='0GB'",), "push", "nowhere", "me/model", "--max_shard_size", "0GB"),
    alone(("license", "empty"), "push", "nowhere", "me/model", "--license", ""),
    alone(("model", "empty"), "translate", ""),
    alone(("output", "empty"), "report", "nowhere", "a", "-o", ""),
    alone(("output", "empty"), "evaluate-translation", "nowhere", "a", "b", "--output", ""),
    alone(("required", "model"), "translate"),
    alone(("required", "files"), "evaluate-lm", "nowhere"),
    alone(("required", "--keep"), "prune", "nowhere", "a", "out"),
    alone(("required", "--num_experts"), "upcycle", "nowhere", "out"),
    alone(("--num_beans", "--num_beams"), "translate", "nowhere", "--num_beans", "3"),
    alone(("stray",), "average", "run", "out", "stray"),
    alone(("--num_beams", "expected one argument"), "translate", "nowhere", "--num_beams"),
    alone(("trian-lm", "train-lm"), "trian-lm"),
    alone(("model",), "evaluate", ""),
]
LOADED = [
    of_lm(("window_length", "1000000000"), "evaluate-lm", "MODEL", "TEXT", "--window_length", "1000000000"),
    of_lm(("num_experts=1000000000", "GB"), "upcycle", "MODEL", "OUT", "--num_experts", "1000000000"),
    of_lm(("keep=5", "4"), "prune", "MODEL", "TEXT", "OUT", "--keep", "5"),
    of_lm(
        ("target_language=de", "translation models"),
        *("prune", "MODEL", "TEXT", "OUT", "--keep", "2", "--target_language", "de"),
    ),
    of_lm(("layers.9", "layers.1"), "report", "MODEL", "TEXT", "--layers", "layers.9"),
    of_lm(("last=10", "2"), "average", "MODEL", "OUT"),
    of_translator(
        ("num_return_sequences=5", "num_beams=4"), "translate", "MODEL", "TEXT", "--num_return_sequences", "5"
    ),
    of_translator(
        ("length_alpha", "num_beams"), "translate", "MODEL", "TEXT", "--num_beams", "1", "--length_alpha", "1"
    ),
    of_translator(("device", "'nonsense'"), "translate", "MODEL", "TEXT", "--device", "nonsense"),
    of_translator(("device='meta'",), "translate", "MODEL", "TEXT", "--device", "meta"),
    of_translator(("tokenize='letters'",), "evaluate-translation", "MODEL", "TEXT", "TEXT", "--tokenize", "letters"),
]
CASES = [*PARSED, *LOADED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_argument_of_a_command_is_named(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
