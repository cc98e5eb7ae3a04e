#!/usr/bin/env bash
# Writes the folder of the shipped translator of captions from its training:
#     model_cards/write_multi30k_en_de.sh [RUN] [FOLDER]
# Run it from the root of the repository, with MOE_HF_DATA set and `moe-hf` on the path. It rounds the weights of RUN to bfloat16,
# evaluates them on validation and test pairs and on tests/caption_sample, and writes FOLDER, which must be new.
. model_cards/rounded_copy.sh
run=${1:-runs/multi30k-en-de-merged-trained} folder=${2:-runs/cards/multi30k-en-de}

# The scores are those of the rounded weights.
rounded_copy "$run" model_cards/multi30k-en-de

# Quoted: the card names the variable, not a folder.
for files in "\${MOE_HF_DATA}/multi30k/val.XX.gz" "\${MOE_HF_DATA}/multi30k/test_2016_flickr.XX.gz" tests/caption_sample/en-de.XX; do
    moe-hf evaluate-translation "$work/model" "${files/XX/en}" "${files/XX/de}" --num_beams 8 --length_alpha 0.6 --coverage_beta 0.2 --record
done

moe-hf push "$work/model" model_cards/multi30k-en-de --dry-run "$folder" --stored_dtype bfloat16 --license other --language en de \
    --data "Image captions of [Multi30k](https://github.com/multi30k/dataset), task 1 (Elliott et al., 2016), which has no licence file. Its README provides the images for non-commercial research and education, and names no licence for the captions. Use the model for non-commercial research and education only. The model translates captions; other text comes out wrong. The training above continues a model of 32 experts that were merged to 23; \`model_cards/README.md\` of the project has all commands."
du -sb "$folder"
