# Sourced by the scripts that write the folders of shipped models. It makes $work, a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# rounded_copy RUN NAME: checks that $folder is new, then writes $work/model, with weights rounded to bfloat16 and, for the card, the records of the training.
rounded_copy() {
    [ ! -e "$folder" ] || { echo "error: FOLDER=$folder must be new" >&2; exit 1; }
    moe-hf push "$1" "$2" --dry-run "$work/model" --stored_dtype bfloat16
    cp "$1"/{run.yaml,expert_history.csv,train_results.json,trainer_state.json} "$work/model"
}
