"""Generates the data of demo_sentences.yaml, without a download."""

from datasets import Dataset

from moe_hf.demo.text_corpus import generate_lines, prompt_of


def dataset(**_) -> dict[str, Dataset]:
    """Return 200 sentences, each cut where its rest is determined. The first sentence has an empty prompt."""
    rows = [{"prompt": "", "ending": next(generate_lines(1, seed=1))}]
    for line in generate_lines(199, seed=2):
        prompt = prompt_of(line)
        rows.append({"prompt": prompt, "ending": line.removeprefix(prompt).lstrip()})
    return {"test": Dataset.from_list(rows)}
