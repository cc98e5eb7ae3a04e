#!/usr/bin/env bash
# Writes the folder of the shipped translator from its training:
#     model_cards/write_tatoeba_en_de_fr.sh [RUN] [FOLDER]
# Run it from the root of the repository, with MOE_HF_DATA set and `moe-hf` on the path. It rounds the weights of RUN to bfloat16,
# evaluates them on validation pairs and on tests/tatoeba_sample, and writes FOLDER, which must be new.
. model_cards/rounded_copy.sh
run=${1:-runs/compare-tatoeba-en-de-fr/MoE-32-seed1} folder=${2:-runs/cards/tatoeba-en-de-fr}

# The scores are those of the rounded weights.
rounded_copy "$run" model_cards/tatoeba-en-de-fr

# Ends most loops in long or unusual text. The BLEU of the validation pairs changes by less than 0.1.
python - "$work/model/generation_config.json" <<'END'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.write_text(json.dumps(json.loads(path.read_text()) | {"no_repeat_ngram_size": 5}, indent=2) + "\n")
END

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
    --data "Sentence pairs of [Tatoeba](https://tatoeba.org), in the selections of [manythings.org/anki](https://www.manythings.org/anki/), under [CC BY 2.0 FR](https://creativecommons.org/licenses/by/2.0/fr/): short everyday sentences by volunteers. Changes: Unicode NFC, runs of spaces made one, repeated pairs dropped. No sentence of the validation pairs is in the training pairs. Rare words and long sentences are often mistranslated; words in capitals, emoji and other languages get unrelated translations."
du -sb "$folder"
