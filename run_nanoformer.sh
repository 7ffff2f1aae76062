#!/usr/bin/env bash
# NanoFormer, a harness for kinds of attention: --mixer mha, gqa (if none is said), diff, diff_v2 or ngpt; other mixers of
# this repository work as well. With a GPU it trains on FineWeb, documents packed and kept apart by masks, or batched by
# length where a mixer cannot mask; --batches padded batches them all so, --batches windows ignores them. Its other knobs: --window, --logit_softcap, --logit_scale,
# --recompute block. Extra arguments pass through; --estimate shows what it costs; GPUS=N for more.
kind=gqa rest=()
while (($#)); do
    case $1 in
        --mixer) [[ $# -gt 1 ]] || { echo "run_nanoformer.sh: --mixer needs a name" >&2; exit 1; }; kind=$2; shift ;;
        --mixer=*) kind=${1#*=} ;;
        *) rest+=("$1") ;;
    esac
    shift
done
set -- ${rest[@]+"${rest[@]}"}
LLAMA=(--mlp swiglu --weight_decay 0.1 --grad_clip 1)
case $kind in
    mha) KIND=(--mixer attn "${LLAMA[@]}") RATE=0.003 ;;
    gqa) KIND=(--mixer attn --n_kv_head 2 "${LLAMA[@]}") RATE=0.003 ;;
    ngpt) KIND=(--mixer ngpt --mlp ngpt --norm ngpt --residual ngpt --logit_gain --weight_decay 0 --warmup_iters 0
                --no-zero_init --no-embed_norm) RATE=0.01 ;;         # unit vectors: no decay, no warm-up, larger steps
    *) KIND=(--mixer "$kind" "${LLAMA[@]}") RATE=0.003 ;;
esac
case $kind in mha | gqa | diff | diff_v2 | ngpt | attn | fan | fan_tall) BATCHES=packed ;; *) BATCHES=padded ;; esac
PARTS=("${KIND[@]}" --mlp_ratio 2.6667 --logit_softcap 0 --optim adamw --schedule cosine)
RACE=("${PARTS[@]}" --n_layer 8 --n_head 8 --n_embd 256 --learning_rate 0.0005 --batches "$BATCHES"
      --batch_size 8 --grad_accumulation_steps 16 --sequence_length 1024 --num_iterations 8000
      --val_loss_every 500 --train_loss_every 25)
EMBEDDED=("${PARTS[@]}" --learning_rate "$RATE" --num_iterations 400 --val_loss_every 100)
SHARDS=11                                                            # 1.05B tokens
source "$(dirname "$0")/scripts/run_race.sh"
