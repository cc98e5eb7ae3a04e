"""Writes the model card of a Hub repository from the files that a training wrote; no number is typed by hand."""

import csv
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data.translation_tokenizers import known_languages
from .errors import InputError
from .evaluation.records import FILE as EVALUATIONS_FILE
from .evaluation.records import command_line, read_evaluations
from .families import FAMILIES
from .model_card_run import directions, evaluation_files, for_others, languages, read_run, search, without_folders
from .model_card_sample import write_sample
from .model_files import ADVICE, read_record
from .model_size import count_embedding_parameters, count_parameters, ops_per_timestep
from .models.versions import TESTED_WITH, TRANSFORMERS
from .routing.history_plot import plot_expert_history, read_expert_history
from .run_folder import AVERAGED_FILE, CONFIG_FILE, HISTORY_FILE
from .version import __version__

TEMPLATE = Path(__file__).parent / "model_card_template.md"
HISTORY_PLOT = "expert_history.png"
# {key of eval_results.json: (metric type on the Hub, name on the card)}.
METRICS = {
    "bleu": ("bleu", "BLEU"),
    "bleu_lowercase": ("bleu", "BLEU, lowercase"),
    "chrf": ("chrf", "chrF"),
    "perplexity_per_word": ("perplexity", "perplexity per word"),
    "perplexity_per_token": ("perplexity", "perplexity per token"),
    "bits_per_word": ("bits_per_word", "bits per word"),
}
# Texts of the card for each family, by model type.
TEXTS = {
    "lstm_moe": {
        "command": "train-lm",
        "summary": "An LSTM language model with sparsely-gated mixture-of-experts layers (Shazeer et al., 2017).",
        "limits": "The model continues text in the style of its training data, whether true or not, and may repeat "
        "wrong or hurtful statements from that data. It does not follow instructions. Biases of the training data "
        "were not reduced. The LSTM state has a fixed size, so the model gradually forgets a long context.",
        "example": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))""",
    },
    "gnmt_moe": {
        "command": "train-translation",
        "summary": "A GNMT-like translation model with sparsely-gated mixture-of-experts layers (Shazeer et al., "
        "2017).",
        "limits": "The model translates single sentences that resemble its training data. Translations of other text "
        "may be fluent but wrong. A translation may omit, add or change parts of the source. Do not rely on the model "
        "where an error can cause harm.",
        "example": """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained("{repo}", trust_remote_code=True)
inputs = tokenizer(["A sentence to translate."], return_tensors="pt")
outputs = model.generate(**inputs, num_beams=4, max_new_tokens=100)
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))""",
    },
}
# Replaces the last lines of the example for multilingual models: a token before the source names the target language.
TAGGED_EXAMPLE = """text = "<2{language}>A sentence to translate."
inputs = tokenizer(text, split_special_tokens=False, return_tensors="pt")
outputs = model.generate(**inputs, num_beams=4, max_new_tokens=100)
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))"""


def write_model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    folder: Path,
    *,
    repo_id: str,
    license: str,
    language: list[str] | None = None,
    data: str | None = None,
) -> None:
    """Write README.md into `folder`, and a plot of the experts' balance if the training recorded it.

    Args:
        model: the model. The card has its configuration, its size, and a sample of its output.
        tokenizer: the model's tokenizer.
        source: the `output_dir` of a training. Its files have the training's numbers, and the numbers of `evaluate-lm
            --record` and `evaluate-translation --record`. The card of a model from another source has no numbers.
        folder: the repository's folder.
        repo_id: the name that the card's example loads.
        license: licence of the weights, by the Hub's name for it.
        language: codes of the languages, such as ["en"]; by default the languages of the training's sentence pairs.
        data: text about the training data, such as their origin, licence and attribution.
    """
    texts, source = TEXTS[model.config.model_type], Path(source)
    task = FAMILIES[model.config.model_type].task
    run = read_run(source)
    state = read_record(source / "trainer_state.json")
    _check_type(source / "trainer_state.json", "global_step", state.get("global_step", 0), int)
    results = _results(source / "eval_results.json")
    evaluated_on = ", ".join(without_folders(evaluation_files(run)))
    dataset = run.get("dataset_name") or "text"
    evaluations = [
        without_folders(record) | {"metrics": _plain_names(record["metrics"], source / EVALUATIONS_FILE)}
        for record in read_evaluations(source)
    ]
    name = repo_id.rpartition("/")[2]
    card = ModelCard.from_template(
        card_data=ModelCardData(
            model_name=name,
            language=language or languages(run) or None,
            license=license,
            library_name="transformers",
            pipeline_tag=task,
            tags=["mixture-of-experts", "moe", "lstm", "moe_hf"],
            eval_results=[
                *_measured(task, results, evaluated_on, without_folders(dataset)),
                *(m for e in evaluations for m in _measured(task, e["metrics"], ", ".join(e["files"]), "text")),
            ]
            or None,
        ),
        template_path=str(TEMPLATE),
        model_name=name,
        summary=texts["summary"],
        facts=_facts(model, directions(run, tokenizer)),
        example=_example(texts["example"], model, tokenizer).replace("{repo}", repo_id),
        translate_command=_command(tokenizer, repo_id) if task == "translation" else "",
        package=f"moe_hf {__version__}",
        versions=", ".join(f"{name} {version}" for name, version in TESTED_WITH.items()),
        transformers=TRANSFORMERS,
        sample=write_sample(model, tokenizer, run),
        metrics=_metric_rows(results),
        evaluated_on=evaluated_on,
        search=search(run) if "bleu" in results else None,
        evaluations=_evaluation_tables(evaluations, repo_id),
        loads=_last_loads(source / HISTORY_FILE),
        last_step=state.get("global_step"),
        command=f"moe-hf {texts['command']} {CONFIG_FILE}" if run else None,
        averaging=_averaging(source / AVERAGED_FILE, name),
        training=_training(source / "train_results.json", state),
        data=data,
        run_yaml=yaml.safe_dump(for_others(run, repo_id), sort_keys=False, allow_unicode=True),
        limits=texts["limits"],
    )
    card.save(folder / "README.md")
    if (source / HISTORY_FILE).is_file():
        plot_expert_history(source / HISTORY_FILE, folder / HISTORY_PLOT)


def _results(path: Path) -> dict:
    return _plain_names(read_record(path), path)


def _plain_names(metrics: dict, path: Path) -> dict:
    """Return the metrics of `path` without "eval_", after checking the types of the metrics that a card shows."""
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    for name in METRICS:
        _check_type(path, name, metrics.get(name, 0.0), int | float)
        _check_type(path, f"{name}_signature", metrics.get(f"{name}_signature") or "", str)
    return metrics


def _check_type(path: Path, name: str, value, kind) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{path}: {name}={value!r} is not a {'text' if kind is str else 'number'}: {ADVICE}")


def _example(example: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    if known := known_languages(tokenizer):
        head = example.partition("inputs = ")[0]
        example = head + TAGGED_EXAMPLE.replace("{language}", known[0])
    if model.generation_config.max_length is not None:  # generate() warns about two limits
        example = example.replace(", max_new_tokens=100", "")
    return example


def _command(tokenizer: PreTrainedTokenizerBase, repo_id: str) -> str:
    """Return a command that translates; for a multilingual model, with its target languages."""
    known = known_languages(tokenizer)
    option = f" --target_language {known[0]}  # or {', '.join(known[1:])}" if known else ""
    return f'echo "A sentence to translate." | moe-hf translate {repo_id}{option.removesuffix("  # or ")}'


def _measured(task: str, results: dict, evaluated_on: str, dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=evaluated_on or "unknown",
            dataset_config=evaluated_on or None,  # distinguishes evaluations on files, which share a type
            metric_type=metric,
            metric_name=label,
            metric_value=round(results[key], 4),
            metric_config=results.get(f"{key}_signature"),
        )
        for key, (metric, label) in METRICS.items()
        if key in results
    ]


def _facts(model: PreTrainedModel, translates: str) -> dict[str, str]:
    config = model.config
    patterns = ["layer_pattern", "encoder_layer_pattern", "decoder_layer_pattern"]
    gate = config.gating
    if config.num_expert_groups is not None:
        gate = f"hierarchical, {config.num_groups_per_tok} of {config.num_expert_groups} groups for a token"
    average = " on average" if config.gating == "strictly_balanced" else ""
    facts = {"translates": translates} if translates else {}
    return facts | {
        "layers": "; ".join(", ".join(getattr(config, name)) for name in patterns if hasattr(config, name)),
        "width": f"{config.hidden_size}",
        "experts in a MoE layer": f"{config.num_experts}, {config.num_experts_per_tok} for a token{average}; "
        f"gate: {gate}",
        "hidden units of an expert": f"{config.moe_intermediate_size}",
        "parameters": f"{count_parameters(config) / 1e6:,.2f} M, plus "
        f"{count_embedding_parameters(config) / 1e6:,.2f} M in embedding and softmax",
        "multiply-adds per token": f"{ops_per_timestep(config) / 1e6:,.2f} M, without embedding and softmax",
        "vocabulary": f"{config.vocab_size:,} tokens",
    }


def _metric_rows(results: dict) -> list[tuple[str, str, str]]:
    rows = []
    for key, (_, label) in METRICS.items():
        if key in results:
            signature = results.get(f"{key}_signature")
            escaped = (signature or "").replace("|", "\\|")  # a bar ends a table cell, even inside code
            rows.append((label, f"{results[key]:.2f}", f"`{escaped}`" if escaped else ""))
    return rows


def _evaluation_tables(evaluations: list[dict], repo_id: str) -> list[tuple[str, str]]:
    """Return (commands, table) for each group of evaluations with the same metrics; one alone has a row per metric."""
    groups = {}
    for evaluation in evaluations:
        rows = _metric_rows(evaluation["metrics"])
        groups.setdefault(tuple(label for label, _, _ in rows), []).append((evaluation, rows))
    tables = []
    for labels, group in groups.items():
        commands = "\n".join(command_line(evaluation, repo_id) for evaluation, _ in group)
        if len(group) == 1:
            table = [("metric", "value", ""), *group[0][1]]
        else:
            files = [" → ".join(Path(name).name for name in evaluation["files"]) for evaluation, _ in group]
            table = [("files", *labels)]
            table += [(name, *(value for _, value, _ in rows)) for name, (_, rows) in zip(files, group)]
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        lines.insert(1, "|---" * len(table[0]) + "|")
        if len(group) > 1:
            notes = [f"- {label}: {note}".replace("\\|", "|") for _, rows in group for label, _, note in rows if note]
            lines += ["", *dict.fromkeys(notes)] if notes else []
        tables.append((commands, "\n".join(lines)))
    return tables


def _last_loads(file: Path) -> list[dict]:
    """Return the last row of each MoE layer, with rounded numbers."""
    if not file.is_file():
        return []
    read_expert_history(file)  # refuses a damaged file
    with open(file, newline="", encoding="utf-8") as lines:
        last = {row["layer"]: row for row in csv.DictReader(lines)}
    names = ("cv_importance", "cv_load", "max_over_mean_load")
    return [row | {name: f"{float(row[name]):.2f}" for name in names} for row in last.values()]


def _averaging(file: Path, name: str) -> str:
    """Describe which checkpoints were averaged, and by which command; "" if none were."""
    checkpoints = read_record(file, list)
    for checkpoint in checkpoints:
        _check_type(file, "checkpoint", checkpoint, str)
    if not checkpoints:
        return ""
    command = f"moe-hf average runs/{name} runs/{name}-averaged --last {len(checkpoints)}"
    steps = ", ".join(checkpoint.rpartition("-")[2] for checkpoint in checkpoints)
    return f"the mean of the weights of {len(checkpoints)} checkpoints (steps {steps}) by `{command}`"


def _training(file: Path, state: dict) -> str:
    results = read_record(file)
    if not results:
        return ""
    _check_type(file, "epoch", results.get("epoch"), int | float)
    return f"{state.get('global_step', '?')} steps, {results['epoch']:.2f} epochs"
