#!/usr/bin/env bash
# Writes the folder of the shipped translator from its training:
#     model_cards/write_tatoeba_en_de_fr.sh [RUN] [FOLDER] [CHECKPOINTS]
# Run it from the root of the repository, with MOE_HF_DATA set and `moe-hf` on the path. It averages the last checkpoints of
# RUN, evaluates the mean on validation pairs and on tests/tatoeba_sample, and writes FOLDER, which must be new.
set -euo pipefail
run=${1:-runs/tatoeba-en-de-fr} folder=${2:-model_cards/tatoeba-en-de-fr} checkpoints=${3:-10}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

moe-hf average "$run" "$work/model" --last "$checkpoints" --stored_dtype bfloat16

both_directions() {  # $1: a file's name with XX for the language; $2: the other language than English
    for pair in "en $2" "$2 en"; do
        read -r source target <<<"$pair"
        moe-hf evaluate-translation "$work/model" "${1/XX/$source}" "${1/XX/$target}" --target_language "$target" --record
    done
}
for language in de fr; do
    # Quoted: the card names the variable, not a folder.
    both_directions "\${MOE_HF_DATA}/tatoeba/en-$language.valid.XX.xz" "$language"
    both_directions "tests/tatoeba_sample/en-$language.XX" "$language"
done

moe-hf push "$work/model" model_cards/tatoeba-en-de-fr --dry-run "$folder" --stored_dtype bfloat16 --license cc-by-2.0 \
    --data "Sentence pairs of [Tatoeba](https://tatoeba.org), in the selections of [manythings.org/anki](https://www.manythings.org/anki/), under [CC BY 2.0 FR](https://creativecommons.org/licenses/by/2.0/fr/): short everyday sentences by volunteers. Text of another kind, such as words in capitals, long sentences or other languages, gets unrelated answers. Changes: Unicode NFC, runs of spaces made one, repeated pairs dropped. No sentence of the validation pairs is in the training pairs."
du -sb "$folder"
