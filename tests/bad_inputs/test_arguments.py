"""Bad arguments of training: wrong types, values out of range, and contradictory combinations.

Only cases with `with_text` have text to read: all other refusals come before any text is read.
"""

import pytest
from bad_inputs import Case, judge

NAN, INF = float("nan"), float("inf")
NO_PAIRS = {"train_source_files": None, "train_target_files": None}


def lm(says, /, *options, **values) -> Case:
    """A case of `moe-hf train-lm` with these values in the YAML file, and these options."""
    return Case(
        f"lm {described(options, values)}", lambda place: ["train-lm", place.lm_config(**values), *options], says
    )


def translation(says, /, *options, **values) -> Case:
    """The arguments of `moe-hf train-translation`, likewise."""

    def command(place):
        return ["train-translation", place.translation_config(**values), *options]

    return Case(f"translation {described(options, values)}", command, says)


def described(options, values) -> str:
    return " ".join([*(f"{name}:{value!r:.40}" for name, value in values.items()), *options])


def raw(says, text: str, command: str = "train-lm") -> Case:
    """A case of a YAML file with this text at its end."""

    def arguments(place):
        config = place.lm_config() if command == "train-lm" else place.translation_config()
        config.write_text(config.read_text(encoding="utf-8") + text, encoding="utf-8")
        return [command, config]

    return Case(f"yaml {text!r}", arguments, says)


TYPES = [
    lm(("window_length=16.5", "whole number"), window_length=16.5),
    lm(("train_files=3", "text"), train_files=3),
    lm(("train_files", "3", "text"), train_files=[3]),
    lm(("train_files=[]", "empty"), train_files=[]),
    lm(("carry_state=2", "true or false"), carry_state=2),
    lm(("carry_state='maybe'", "true or false"), carry_state="maybe"),
    raw(("seed=2024-01-01", "whole number"), "seed: 2024-01-01\n"),
    lm(("num_experts=[4]", "whole number"), num_experts=[4]),
    lm(("num_experts='many'", "whole number"), num_experts="many"),
    lm(("num_experts={'a': 1}", "whole number"), num_experts={"a": 1}),
    lm(("num_experts=True", "whole number"), num_experts=True),
    lm(("hidden_size='16.5'", "whole number"), "--hidden_size", "16.5"),
    lm(("learning_rate=[0.1]", "number"), learning_rate=[0.1]),
    lm(("dropout='much'", "number"), "--dropout", "much"),
    lm(("output_dir=5", "text"), output_dir=5),
    lm(("output_dir", "empty"), output_dir=""),
    lm(("tokenizer_kind=False", "text"), tokenizer_kind=False),
    lm(("gating=['softmax']", "text"), gating=["softmax"]),
    lm(("layer_pattern", "3", "text"), layer_pattern=["lstm", 3]),
    translation(("source_language=False", "quotes"), source_language=False),
    translation(("eval_num_beams=2.5", "whole number"), eval_num_beams=2.5),
    translation(("tokens_per_batch=[40]", "whole number"), tokens_per_batch=[40]),
]
EMPTY = [
    raw(("seed", "empty"), "seed:\n"),
    lm(("window_length", "empty"), window_length=None),
    lm(("tokenizer_kind", "empty"), tokenizer_kind=None),
    lm(("vocab_size", "empty"), vocab_size=None),
    lm(("num_train_epochs", "empty"), num_train_epochs=None),
    lm(("carry_state", "empty"), carry_state=None),
    lm(("train_files",), train_files=None),
    lm(("tokenizer_kind", "empty"), "--tokenizer_kind", ""),
    translation(("constant_steps", "empty"), constant_steps=None),
]
YAML = [
    raw(("hidden_size", "twice"), "hidden_size: 8\n"),
    raw(("vocab_size", "twice"), "vocab_size: 8\n", "train-translation"),
    raw(("0 is given twice", "line"), "importance_loss_coef_schedule: {0: 0.1, 0: 0.2}\n"),
    raw(("5",), "5: 3\n"),
    raw(("config.yaml", "line"), "seed: !!python/object/apply:os.getcwd []\n"),
    raw(("config.yaml", "line"), "seed: 5\n--- \nseed: 6\n"),
    raw(("config.yaml",), "? [a, b]\n: 5\n"),
]
RANGES = [
    lm(("layer_pattern", "at least one 'lstm'"), layer_pattern=["moe"]),
    lm(
        ("metric_for_best_model=perplexity_per_word", "greater_is_better=True"),
        metric_for_best_model="perplexity_per_word",
        greater_is_better=True,
    ),
    lm(("window_length=0", "at least 1"), window_length=0),
    lm(("window_length=-3", "at least 1"), "--window_length", "-3"),
    lm(("vocab_size=0", "at least 1"), vocab_size=0),
    lm(("max_train_lines=0", "at least 1"), max_train_lines=0),
    lm(("preprocessing_num_workers=0", "at least 1"), preprocessing_num_workers=0),
    lm(("preprocessing_num_workers=1000000000", "at most"), preprocessing_num_workers=10**9),
    lm(("hidden_size=0", "at least 1"), hidden_size=0),
    lm(("num_experts=-1", "at least 1"), num_experts=-1),
    lm(("num_experts_per_tok=5", "num_experts=4"), num_experts_per_tok=5),
    lm(("dropout=nan", "at least 0 and below 1"), dropout=NAN),
    lm(("dropout=1.5", "at least 0 and below 1"), dropout=1.5),
    lm(("label_smoothing=nan", "at least 0 and below 1"), label_smoothing=NAN),
    lm(("importance_loss_coef=nan",), importance_loss_coef=NAN),
    lm(("load_loss_coef=inf",), load_loss_coef=INF),
    lm(("initializer_range=-1.0",), initializer_range=-1.0),
    lm(("initializer_range=nan",), initializer_range=NAN),
    lm(("gate_std=-1.0",), gate_std=-1.0),
    lm(("gate_std=nan",), gate_std=NAN),
    lm(("gate_std=2.0", "strictly_balanced"), gate_std=2.0, gating="strictly_balanced"),
    lm(("num_sampled=0", "at least 1"), num_sampled=0),
    lm(("num_sampled=50", "vocab_size=50"), num_sampled=50),
    lm(("loss_chunk_size=0", "at least 1"), loss_chunk_size=0),
    lm(("gating='hard'", "noisy_top_k"), gating="hard"),
    lm(("layer_pattern", "'gru'"), layer_pattern=["lstm", "gru"]),
    lm(("tokenizer_kind='letters'", "word"), tokenizer_kind="letters"),
    lm(('experts_implementation="magic"', "eager"), experts_implementation="magic"),
    lm(("hidden_size=1000000000", "GB"), hidden_size=10**9),
    lm(("num_experts=1000000000", "GB"), num_experts=10**9),
    lm(("vocab_size=1000000000000", "at most"), vocab_size=10**12),
    lm(("num_experts=1000000000000000000000000000000",), num_experts=10**30),
    lm(("num_train_epochs=0",), num_train_epochs=0),
    lm(("num_train_epochs=-1",), num_train_epochs=-1),
    lm(("num_train_epochs=inf",), num_train_epochs=INF),
    lm(("max_steps=0",), max_steps=0),
    lm(("max_steps=-5",), max_steps=-5),
    lm(("save_steps=0",), save_steps=0, save_strategy="steps"),
    lm(("save_steps=-2",), save_steps=-2, save_strategy="steps"),
    lm(("save_steps=nan",), save_steps=NAN, save_strategy="steps"),
    lm(("logging_steps=0",), logging_steps=0),
    lm(("logging_steps=-1",), logging_steps=-1),
    lm(("logging_steps=2.5",), logging_steps=2.5),
    lm(("eval_steps=0",), eval_steps=0, eval_strategy="steps"),
    lm(("eval_steps=-1",), eval_steps=-1, eval_strategy="steps"),
    lm(("save_total_limit=0",), save_total_limit=0),
    lm(("learning_rate=-0.1",), learning_rate=-0.1),
    lm(("learning_rate=nan",), "--learning_rate", "nan"),
    lm(("learning_rate=inf",), learning_rate=INF),
    lm(("weight_decay=nan",), weight_decay=NAN),
    lm(("adam_beta1=1.0",), adam_beta1=1.0),
    lm(("adam_beta2=nan",), adam_beta2=NAN),
    lm(("adam_epsilon=-1.0",), adam_epsilon=-1.0),
    lm(("adam_epsilon=0", "factored_adam"), adam_epsilon=0.0, optim="factored_adam"),
    lm(("max_grad_norm=nan",), max_grad_norm=NAN),
    lm(("max_grad_norm=-1",), max_grad_norm=-1),
    lm(("warmup_steps=-1",), warmup_steps=-1),
    lm(("warmup_steps=2.5",), warmup_steps=2.5),
    lm(("warmup_steps=nan",), warmup_steps=NAN),
    lm(("seed=-1",), seed=-1),
    lm(("seed=18446744073709551616",), seed=2**64),
    lm(("data_seed=-1",), data_seed=-1),
    lm(("per_device_train_batch_size=0",), per_device_train_batch_size=0),
    lm(("per_device_eval_batch_size=0",), per_device_eval_batch_size=0),
    lm(("gradient_accumulation_steps=0",), gradient_accumulation_steps=0),
    lm(("dataloader_num_workers=-1",), dataloader_num_workers=-1),
    lm(("dataloader_prefetch_factor=0",), dataloader_prefetch_factor=0, dataloader_num_workers=1),
    lm(("torch_empty_cache_steps=0",), torch_empty_cache_steps=0),
    lm(("neftune_noise_alpha=nan",), neftune_noise_alpha=NAN),
    lm(("expert_parallel_size=0",), expert_parallel_size=0),
    lm(("label_smoothing_factor=0.1", "label_smoothing"), label_smoothing_factor=0.1),
    translation(("eval_num_beams=1000000", "at most 1000"), eval_num_beams=10**6),
    translation(("eval_num_beams=0",), eval_num_beams=0),
    translation(("eval_tokens_per_batch=0",), eval_tokens_per_batch=0),
    translation(("tokens_per_batch=0",), tokens_per_batch=0),
    translation(("length_bucket_width=0",), length_bucket_width=0),
    translation(("sampling_temperature=nan",), sampling_temperature=NAN),
    translation(("sampling_temperature=0",), sampling_temperature=0),
    translation(("max_source_length=0",), max_source_length=0),
    translation(("max_train_pairs=-1",), max_train_pairs=-1),
    translation(("constant_steps=-1",), constant_steps=-1),
    translation(("attention_type='dot'", "product"), attention_type="dot"),
    translation(("encoder_layer_pattern", "at least one 'lstm'"), encoder_layer_pattern=["moe"]),
    translation(("hidden_size=1000000000", "GB"), hidden_size=10**9),
]
CHOICES = [
    lm(("lr_scheduler_type='wavy'", "cosine"), lr_scheduler_type="wavy"),
    lm(("save_strategy='sometimes'", "epoch"), save_strategy="sometimes"),
    lm(("eval_strategy='sometimes'", "epoch"), "--eval_strategy", "sometimes"),
    lm(("logging_strategy='often'", "steps"), logging_strategy="often"),
    lm(("hub_strategy='yes'", "checkpoint"), hub_strategy="yes"),
    lm(("report_to='foo'", "tensorboard"), report_to="foo"),
    lm(("report_to='foo'", "tensorboard"), "--report_to", "foo"),
    lm(("report_to='comet_ml'", "installed"), report_to=["comet_ml"]),
    lm(("log_level='loud'", "warning"), log_level="loud"),
    lm(("train_sampling_strategy='best'", "random"), train_sampling_strategy="best"),
    lm(("debug='everything'", "underflow_overflow"), debug="everything"),
    lm(("optim='adam'", "adamw_torch"), optim="adam"),
    lm(("optim='adamw_apex_fused'",), optim="adamw_apex_fused"),
    lm(("optim='adamw_bnb_8bit'",), optim="adamw_bnb_8bit"),
    lm(("metric_for_best_model='nonsense'", "perplexity_per_word"), metric_for_best_model="nonsense"),
    translation(("metric_for_best_model='bleu_signature'", "bleu"), metric_for_best_model="bleu_signature"),
    lm(("torch_compile_backend='fast'", "inductor"), torch_compile_backend="fast"),
    translation(("tokenize='letters'", "13a"), tokenize="letters"),
]
JSON = [
    lm(("importance_loss_coef_schedule",), "--importance_loss_coef_schedule", '{"0": '),
    lm(("importance_loss_coef_schedule=[1]", "mapping"), importance_loss_coef_schedule=[1]),
    lm(("importance_loss_coef_schedule", "step"), importance_loss_coef_schedule={"soon": 1}),
    lm(("load_loss_coef_schedule", "nan"), load_loss_coef_schedule={0: NAN}),
    lm(("load_loss_coef_schedule",), "--load_loss_coef_schedule", "0.1"),
    lm(("load_loss_coef_schedule", "twice"), "--load_loss_coef_schedule", '{"0": 0.1, "0": 0.2}'),
    lm(("lr_scheduler_kwargs",), "--lr_scheduler_kwargs", "[1]"),
    lm(("lr_scheduler_kwargs", "nonsense"), lr_scheduler_type="cosine", lr_scheduler_kwargs={"nonsense": 1}),
    lm(("lr_scheduler_kwargs", "polynomial"), lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": "two"}),
    lm(("lr_scheduler_type", "warmup_stable_decay"), lr_scheduler_type="warmup_stable_decay"),
    lm(("fsdp_config",), "--fsdp_config", "nowhere.json"),
    lm(("accelerator_config", "nowhere.json"), "--accelerator_config", "nowhere.json"),
    lm(("accelerator_config", "nonsense"), accelerator_config={"nonsense": True}),
    lm(("accelerator_config",), accelerator_config=[1]),
    lm(("deepspeed",), deepspeed="nowhere.json"),
    lm(
        ("activation_checkpointing_kwargs", "nonsense"),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"nonsense": 1},
    ),
    lm(("optim_args", "nonsense"), optim_args="nonsense"),
    translation(("train_pairs=5", "list of mappings"), train_pairs=5, **NO_PAIRS),
    translation(("train_pairs", "JSON"), "--train_pairs", "[{", **NO_PAIRS),
    translation(
        ("train_pairs, entry 1", "source_files=3", "text"),
        train_pairs=[{"source_files": 3, "target_files": "a"}],
        **NO_PAIRS,
    ),
    translation(("train_pairs, entry 1", "'sources'"), train_pairs=[{"sources": "a"}], **NO_PAIRS),
    translation(
        ("train_pairs, entry 1", "parallel_files"), train_pairs=[{"parallel_files": {"en": 3, "de": "a"}}], **NO_PAIRS
    ),
    translation(("train_pairs, entry 1", "split"), train_pairs=[{"dataset_name": "a", "split": 5}], **NO_PAIRS),
    translation(
        ("train_pairs", "twice"),
        "--train_pairs",
        '[{"source_files": "a", "source_files": "b", "target_files": "c"}]',
        **NO_PAIRS,
    ),
    translation(("validation_pairs",), validation_pairs={"a": 1}),
]
TOGETHER = [
    lm(("train_files", "dataset_name"), dataset_name="some/set"),
    lm(("dataset_config_name", "dataset_name"), dataset_config_name="en"),
    lm(("train_split", "dataset_name"), train_split="test"),
    lm(("text_column", "dataset_name"), text_column="words"),
    translation(("train_split", "dataset_name"), train_split="test"),
    translation(("train_source_files", "dataset_name"), dataset_name="some/set"),
    translation(("train_source_files", "train_target_files"), train_target_files=None),
    translation(("max_train_pairs", "5.5"), max_train_pairs=5.5),
    lm(("num_groups_per_tok=1", "num_expert_groups"), num_groups_per_tok=1),
    lm(("load_best_model_at_end", "eval_strategy"), load_best_model_at_end=True),
    lm(("early_stopping_patience=2", "eval_strategy"), early_stopping_patience=2),
    lm(("early_stopping_threshold=0.5", "early_stopping_patience"), early_stopping_threshold=0.5),
    lm(("warmup_steps=5", "constant_with_warmup"), lr_scheduler_type="constant", warmup_steps=5),
    lm(("warmup_steps=5", "reduce_lr_on_plateau"), lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=5),
    lm(("save_strategy", "eval_strategy"), save_strategy="best", metric_for_best_model="loss"),
    lm(("eval_strategy", "validation_files"), eval_strategy="steps", validation_files=None),
    translation(("eval_strategy", "validation"), eval_strategy="steps"),
    lm(("optim_args", "factored_adam"), optim="factored_adam", optim_args="a=1"),
    lm(("train_sampling_strategy", "carry_state"), carry_state=True, train_sampling_strategy="group_by_length"),
    lm(("auto_find_batch_size", "carry_state"), carry_state=True, auto_find_batch_size=True),
    translation(("per_device_train_batch_size=4", "tokens_per_batch"), per_device_train_batch_size=4),
    translation(("per_device_eval_batch_size=4", "eval_tokens_per_batch"), per_device_eval_batch_size=4),
    translation(("constant_steps=1", "inverse_sqrt"), lr_scheduler_type="cosine"),
    lm(("bf16", "fp16"), bf16=True, fp16=True),
    lm(("fp16=True", "bf16=True"), fp16=True),
    lm(("fsdp=True", "torchrun"), fsdp=True),
    lm(("dataloader_persistent_workers=True", "dataloader_num_workers"), dataloader_persistent_workers=True),
    lm(("stray",), "stray"),
    lm(("--hiden_size", "--hidden_size"), "--hiden_size", "8"),
    lm(("hidden_size",), "--hidden_size"),
]
NOT_HERE = [
    lm(("debug=underflow_overflow",), debug="underflow_overflow"),
    lm(("use_liger_kernel=True",), use_liger_kernel=True),
    lm(("bf16_full_eval=True", "bf16=True"), bf16_full_eval=True),
    translation(("fp16_full_eval=True", "bf16=True"), fp16_full_eval=True),
    translation(("auto_find_batch_size=True", "tokens_per_batch"), auto_find_batch_size=True),
    translation(("dataloader_drop_last=True", "tokens_per_batch"), dataloader_drop_last=True),
    lm(("optim_args='betas=x'", "has no effect"), optim_args="betas=x"),
    lm(("gradient_accumulation_kwargs", "'x'"), accelerator_config={"gradient_accumulation_kwargs": {"x": 1}}),
    lm(("model_name_or_path=nowhere", "cannot be loaded"), model_name_or_path="nowhere"),
    translation(("generation_config=nowhere", "cannot be loaded"), generation_config="nowhere"),
    translation(("generation_num_beams=2", "eval_num_beams"), generation_num_beams=2),
    translation(("tokens_per_batch=1000000000000000000", "at most"), tokens_per_batch=10**18),
    lm(
        ("dataloader_drop_last=True", "per_device_train_batch_size=1000"),
        with_text=True,
        dataloader_drop_last=True,
        per_device_train_batch_size=1000,
    ),
    translation(("gradient_accumulation_steps=1000", "24"), with_text=True, gradient_accumulation_steps=1000),
]


def _changed_width(place):
    return ["train-lm", place.lm_config(model_name_or_path=str(place.lm()), hidden_size=16)]


NOT_HERE.append(Case("hidden_size beside a checkpoint", _changed_width, ("hidden_size=16", "hidden_size=8")))
for name in ("initializer_range", "gate_std"):
    NOT_HERE.append(
        Case(
            f"{name} beside a checkpoint",
            lambda place, name=name: ["train-lm", place.lm_config(model_name_or_path=str(place.lm()), **{name: 0.5})],
            (f"{name}=0.5 has no effect with model_name_or_path",),
        )
    )
CASES = [*NOT_HERE, *TYPES, *EMPTY, *YAML, *RANGES, *CHOICES, *JSON, *TOGETHER]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_argument_is_named(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
