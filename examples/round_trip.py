#!/usr/bin/env python3
"""Translate English sentences into another language and back, with the trained translator of this repository.

    python examples/round_trip.py [--model FOLDER] [--through fr] [SENTENCE ...]

One model serves both directions: `target_language` chooses the language of the output.
"""

import argparse
from pathlib import Path

import moe_hf

MODEL = Path(__file__).parents[1] / "model_cards" / "tatoeba-en-de-fr"
SENTENCES = ["Where did you buy this book?", "I have never been to Paris.", "My brother is older than me."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", default=SENTENCES)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--through", default="de", help="the language in between (default: de)")
    arguments = parser.parse_args()
    translate = moe_hf.pipeline("translation", model=arguments.model, num_beams=4)
    there = [one["translation_text"] for one in translate(arguments.sentences, target_language=arguments.through)]
    back = [one["translation_text"] for one in translate(there, target_language="en")]
    for lines in zip(arguments.sentences, there, back):
        print(*lines, sep=" -> ")


if __name__ == "__main__":
    main()
