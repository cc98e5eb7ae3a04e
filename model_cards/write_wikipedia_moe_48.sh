#!/usr/bin/env bash
# Writes the folder of the shipped language model from its training:
#     model_cards/write_wikipedia_moe_48.sh [RUN] [FOLDER]
# Run it from the root of the repository, with MOE_HF_DATA set and `moe-hf` on the path. It rounds the weights of RUN to bfloat16,
# evaluates them on validation text and on tests/english_sample.txt, and writes FOLDER, which must be new.
. model_cards/rounded_copy.sh
run=${1:-runs/wikipedia-moe-48} folder=${2:-runs/cards/wikipedia-moe-48}

# The scores are those of the rounded weights.
rounded_copy "$run" model_cards/wikipedia-moe-48

# Quoted: the card names the variable, not a folder.
moe-hf evaluate-lm "$work/model" "\${MOE_HF_DATA}/wikipedia-en/valid.txt.xz" --record
moe-hf evaluate-lm "$work/model" tests/english_sample.txt --record

moe-hf push "$work/model" model_cards/wikipedia-moe-48 --dry-run "$folder" --stored_dtype bfloat16 --license cc-by-sa-3.0 --language en \
    --data "Articles of English [Wikipedia](https://en.wikipedia.org) of 2018 by its contributors, under [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/): 10 million tokens of plain text in articles without tables, lists and formulas. Sentences are mostly grammatical for a few words; facts, names and numbers in its text are invented."
du -sb "$folder"
