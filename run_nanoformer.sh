#!/usr/bin/env bash
# NanoFormer, a harness for kinds of attention: --mixer mha, gqa (the default), diff, diff_v2 or
# ngpt; other mixers of this repository work as well. With a GPU it trains on FineWeb. Documents are
# packed and kept apart by masks, or batched by length where a mixer cannot mask. --batches padded
# batches them all so, --batches windows ignores documents. Its other knobs: --window,
# --logit_softcap, --logit_scale, --recompute block.
# Extra arguments pass through; --estimate shows what it costs; GPUS=N for more than one.
source "$(dirname "$0")/scripts/setup_env.sh"

kind=gqa
rest=()
while (($#)); do
    case $1 in
        --mixer)
            [[ $# -gt 1 ]] || fail "run_nanoformer.sh: --mixer needs a name"
            kind=$2
            shift
            ;;
        --mixer=*) kind=${1#*=} ;;
        *) rest+=("$1") ;;
    esac
    shift
done
set -- ${rest[@]+"${rest[@]}"}

can_mask() {                             # do all the mixers named know how to mask documents?
    "$python" -P -c 'import sys
sys.path.insert(0, sys.argv[1])
from train_gpt2 import MIXERS
rows = sys.argv[2].split(",")
sys.exit(not all(row in MIXERS and hasattr(MIXERS[row][0], "masks_documents") for row in rows))' \
        "$root" "$1"
}

LLAMA=(--mlp swiglu --weight_decay 0.1)
RATE=0.0005                              # of the race
SMALL_RATE=0.003                         # of the embedded run
case $kind in
    mha) mixer=attn KIND=("${LLAMA[@]}") ;;
    gqa) mixer=attn KIND=("${LLAMA[@]}" --n_kv_head 2) ;;
    # The papers' differential attention has no norm of queries and keys.
    diff | diff_v2) mixer=$kind KIND=("${LLAMA[@]}" --head_norm none) ;;
    # Unit vectors: no decay, no warm-up, a larger rate (NVIDIA/ngpt has 0.0015).
    ngpt)
        mixer=ngpt
        KIND=(
            --mlp ngpt
            --norm ngpt
            --residual ngpt
            --logit_gain
            --weight_decay 0
            --warmup_iters 0
            --no-zero_init
            --no-embed_norm
        )
        RATE=0.0015
        SMALL_RATE=0.01
        ;;
    *) mixer=$kind KIND=("${LLAMA[@]}") ;;
esac
BATCHES=padded
can_mask "$mixer" && BATCHES=packed

PARTS=(
    --mixer "$mixer"
    "${KIND[@]}"
    --mlp_ratio 2.6667
    --logit_softcap 0
    --grad_clip 1
    --optim adamw
    --schedule cosine
)
RACE=(
    "${PARTS[@]}"
    --model nanoformer
    --learning_rate "$RATE"
    --batches "$BATCHES"
    --batch_size 8
    --grad_accumulation_steps 16
    --sequence_length 1024
    --num_iterations 8000
    --val_loss_every 500
    --train_loss_every 25
)
EMBEDDED=(
    "${PARTS[@]}"
    --learning_rate "$SMALL_RATE"
    --num_iterations 400
    --val_loss_every 100
)
SHARDS=11                                # 1.05B tokens
source "$(dirname "$0")/scripts/run_race.sh"
