# Sourced by run_*.sh, which set RACE (flags of the FineWeb race; empty: the small run is all, on any device), EMBEDDED
# (flags of the small run), SHARDS to fetch, and where they differ from the defaults REPO, DATA, VOCAB (of the shards) and
# EXTRA (optional packages).
REPO=${REPO:-kjj0/fineweb10B-gpt2} DATA=${DATA:-data/fineweb10B} VOCAB=${VOCAB:-50257}
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
check() { "$python" train_gpt2.py "$@"; }                            # a wrong flag or shard ends here, with one line
out=logs sizes=(--vocab_size "$VOCAB") task=train previous=
race=${#RACE[@]}
[[ $race == 0 ]] && { RACE=("${EMBEDDED[@]}"); sizes=(); }
for flag in "$@"; do
    [[ $flag == --estimate || $flag == --help ]] && task=tell
    [[ $previous == --output_dir ]] && out=$flag
    [[ $flag == --output_dir=* ]] && out=${flag#*=}
    [[ $flag == --input_bin* ]] && sizes=()                          # shards of your own: nothing is fetched
    previous=$flag
done
[[ $task == tell ]] && { check ${sizes[@]+"${sizes[@]}"} "${RACE[@]}" "$@"; exit; }
if [[ $race != 0 ]] && has_cuda; then
    flags=(--input_bin "$DATA/*_train_*.bin" --input_val_bin "$DATA/*_val_*.bin" "${RACE[@]}" "$@")
    check ${sizes[@]+"${sizes[@]}"} "${RACE[@]}" "$@" --estimate >/dev/null                # before anything is fetched
    has tiktoken huggingface_hub || install tiktoken huggingface-hub
    [[ ${#sizes[@]} == 0 ]] || "$python" data/fineweb.py "$SHARDS" --repo "$REPO" --out "$DATA"
else
    [[ $race == 0 ]] || echo "no CUDA device: this is the embedded run (Tiny Shakespeare, byte by byte) instead of the FineWeb race"
    flags=("${EMBEDDED[@]}" "$@")
fi
check "${flags[@]}" --estimate
"$python" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-1}" train_gpt2.py "${flags[@]}"
newest=$(ls -t "$out"/*/model.pt | head -n 1)
echo "a sample (python sample.py $newest):"
"$python" sample.py "$newest"
