# Sourced by run_*.sh, which set RACE (flags of the FineWeb race), EMBEDDED (flags of the small run) and SHARDS to fetch.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
FINEWEB=(--input_bin 'data/fineweb10B/fineweb_train_*.bin' --input_val_bin 'data/fineweb10B/fineweb_val_*.bin')
check() { "$python" train_gpt2.py "$@"; }                            # a wrong flag or shard ends here, with one line
out=logs previous=
for flag in "$@"; do
    [[ $flag == --estimate || $flag == --help ]] && { check --vocab_size 50257 "${RACE[@]}" "$@"; exit; }
    [[ $previous == --output_dir ]] && out=$flag
    [[ $flag == --output_dir=* ]] && out=${flag#*=}
    previous=$flag
done
if has_cuda; then
    flags=("${FINEWEB[@]}" "${RACE[@]}" "$@")
    check --vocab_size 50257 "${RACE[@]}" "$@" --estimate >/dev/null # before anything is fetched
    "$python" data/fineweb.py "$SHARDS"
else
    echo "no CUDA device: this is the embedded run (Tiny Shakespeare, byte by byte) instead of the FineWeb race"
    flags=("${EMBEDDED[@]}" "$@")
fi
check "${flags[@]}" --estimate
"$python" -m torch.distributed.run --standalone --nproc_per_node="${GPUS:-1}" train_gpt2.py "${flags[@]}"
newest=$(ls -t "$out"/*/model.pt | head -n 1)
echo "a sample (python sample.py $newest):"
"$python" sample.py "$newest"
