#!/usr/bin/env bash
# FANformer: a Fourier Analysis layer in front of attention, CoLA's low-rank projections,
# HybridNorm*, gated residuals, SwiGLU. Sizes as published, but 768 wide so that 12 heads divide it.
# Its document has --dropout 0.1, which one epoch of text does not need.
# Extra arguments pass through; --estimate shows what it costs; GPUS=N for more than one.
PARTS=(
    --mixer fan
    --fan_ratio 0.15
    --head_norm qkv
    --linear cola
    --norm hybrid_star
    --residual gated
    --mlp swiglu
    --mlp_ratio 2.6667
    --tie_embeddings
)
RACE=(
    "${PARTS[@]}"
    --model d12
    --n_kv_head 6
    --optim muon
    --muon_learning_rate 0.02
    --learning_rate 0.002
    --warmup_iters 250
    --warmdown_iters 2400
    --batch_size 16
    --grad_accumulation_steps 16
    --sequence_length 1024
    --num_iterations 4000
    --no-shuffle
    --val_loss_every 125
    --train_loss_every 25
    --target_val_loss 3.3821
)
EMBEDDED=(
    "${PARTS[@]}"
    --n_kv_head 2
    --num_iterations 500
)
SHARDS=11                                # 1.05B tokens
source "$(dirname "$0")/scripts/run_race.sh"
