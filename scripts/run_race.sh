# Sourced by run_*.sh, which set
#   RACE      flags of the FineWeb race; empty: the small run is all, on any device
#   EMBEDDED  flags of the small run, on the text that is in the repository
#   SHARDS    training shards of 100M tokens to fetch
# and, where they differ from what stands here, REPO and DATA (where the shards are, and go), VOCAB
# (of the shards) and EXTRA (optional packages).
REPO=${REPO:-kjj0/fineweb10B-gpt2}
DATA=${DATA:-data/fineweb10B}
VOCAB=${VOCAB:-50257}
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

run() {                                  # prints a command as it can be typed, and runs it
    { printf '+'; printf ' %q' "$@"; echo; } >&2
    "$@"
}

out=logs
vocab=(--vocab_size "$VOCAB")            # for --estimate before there are shards
only_tell=
only_embedded=
previous=
if ((${#RACE[@]} == 0)); then
    only_embedded=1
    RACE=("${EMBEDDED[@]}")
    vocab=()
fi
for flag in "$@"; do
    case $flag in
        --estimate | --help) only_tell=1 ;;
        --output_dir=*) out=${flag#*=} ;;
        --input_bin*) vocab=() ;;        # shards of your own: nothing is fetched
    esac
    [[ $previous == --output_dir ]] && out=$flag
    previous=$flag
done
race=("$python" train_gpt2.py ${vocab[@]+"${vocab[@]}"} "${RACE[@]}" "$@")

if [[ $only_tell ]]; then
    run "${race[@]}"
    exit
fi

if [[ ! $only_embedded ]] && has_cuda; then
    "${race[@]}" --estimate >/dev/null   # a wrong flag ends here, before anything is fetched
    has tiktoken huggingface_hub || install tiktoken huggingface-hub
    ((${#vocab[@]} == 0)) || run "$python" data/fineweb.py "$SHARDS" --repo "$REPO" --out "$DATA"
    flags=(--input_bin "$DATA/*_train_*.bin" --input_val_bin "$DATA/*_val_*.bin" "${RACE[@]}" "$@")
else
    [[ $only_embedded ]] || echo "no CUDA device: this is the embedded run (Tiny Shakespeare, byte" \
        "by byte) instead of the FineWeb race"
    flags=("${EMBEDDED[@]}" "$@")
fi
"$python" train_gpt2.py "${flags[@]}" --estimate
run "$python" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-1}" \
    train_gpt2.py "${flags[@]}"
newest=$(ls -t "$out"/*/model.pt | head -n 1)
echo "a sample:"
run "$python" sample.py "$newest"
