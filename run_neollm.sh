#!/usr/bin/env bash
# NeoLLM: three Gated DeltaNet layers to one of FAN attention, PolyNorm MLPs, LayerNorm scaling,
# GPAS, AdEMAMix, and its card's schedule. LayerNorm scaling's authors warn against scaled
# initialisation, and without zero-initialised projections it ended 0.03 lower here
# (records/2026-11-24_small-questions).
# The card's data is FineWeb-Edu in Qwen tokens. This fetches FineWeb-Edu in GPT-2 tokens: make the
# other with data/text.py --tokenizer qwen and name it by --input_bin and --input_val_bin.
# Extra arguments pass through; --estimate shows what it costs, counting Qwen's vocabulary; GPUS=N
# for more than one.
PARTS=(
    --mixer 'gdn,gdn,gdn,fan'
    --n_kv_head 2
    --fan_ratio 0.125
    --mlp polynorm_gated
    --mlp_ratio 2
    --norm lns
    --no-zero_init
    --residual gpas
    --tie_embeddings
    --no-pad_vocab
    --logit_softcap 0
    --optim ademamix
    --adam_beta1 0.9
    --adam_beta2 0.999
    --ademamix_alpha 5
    --ademamix_beta3 0.999
    --weight_decay 0.1
    --schedule cosine
    --lr_start 0.5
    --lr_end 0.1
)
RACE=(
    "${PARTS[@]}"
    --n_layer 12
    --n_head 8
    --n_embd 512
    --learning_rate 0.0006
    --warmup_iters 5000
    --ademamix_warmup 5000
    --batch_size 64
    --grad_accumulation_steps 1
    --sequence_length 512
    --num_iterations 61875
    --no-shuffle
    --val_loss_every 2500
    --train_loss_every 100
)
EMBEDDED=(
    "${PARTS[@]}"
    --learning_rate 0.003
    --num_iterations 300
    --val_loss_every 100
)
SHARDS=21                                # 2.03B tokens
REPO=karpathy/fineweb-edu-100B-gpt2-token-shards
DATA=data/fineweb-edu-100B-gpt2-token-shards
VOCAB=151665
# shellcheck disable=SC2034  # setup_env.sh reads it
EXTRA=(pytorch-optimizer)                # AdEMAMix
source "$(dirname "$0")/scripts/run_race.sh"
