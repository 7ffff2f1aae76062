#!/usr/bin/env bash
# Runs this record again: 63 runs, 1 to 3 minutes each on one core. It needs the package
# pytorch-optimizer. PYTHON names a Python that has it and torch. Extra arguments go to every run:
# --estimate says what it costs and trains nothing.
# Afterwards: python records/table.py logs/2026-11-22_parts-of-fanformer-and-neollm base
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=logs/2026-11-22_parts-of-fanformer-and-neollm
export OMP_NUM_THREADS=1
train() {
    "${PYTHON:-python}" train_gpt2.py --device cpu \
        --num_iterations 150 --val_loss_every 0 --train_loss_every 50 "$@"
}

for seed in 0 1 2; do
    train --seed "$seed" --output_dir "$out/base" --mixer attn "$@"
    # another mixer
    train --seed "$seed" --output_dir "$out/gdn3_attn" \
        --mixer gdn,gdn,gdn,attn --gdn_chunk 64 --mlp_ratio 3.57 "$@"
    train --seed "$seed" --output_dir "$out/fan" --mixer fan --mlp_ratio 3.5625 "$@"
    train --seed "$seed" --output_dir "$out/fan_sin" \
        --mixer fan --fan_trig sin --mlp_ratio 3.5 "$@"
    train --seed "$seed" --output_dir "$out/fan_linear" \
        --mixer fan --fan_ratio 0 --mlp_ratio 3.5 "$@"
    # another norm or residual
    train --seed "$seed" --output_dir "$out/head_norm_qkv" --mixer attn --head_norm qkv "$@"
    train --seed "$seed" --output_dir "$out/hybrid" \
        --mixer attn --norm hybrid --head_norm qkv "$@"
    train --seed "$seed" --output_dir "$out/hybrid_star" \
        --mixer attn --norm hybrid_star --head_norm qkv "$@"
    train --seed "$seed" --output_dir "$out/lns" --mixer attn --norm lns "$@"
    train --seed "$seed" --output_dir "$out/gated" --mixer attn --residual gated "$@"
    train --seed "$seed" --output_dir "$out/gpas" --mixer attn --residual gpas "$@"
    # another MLP
    train --seed "$seed" --output_dir "$out/swiglu" \
        --mixer attn --mlp swiglu --mlp_ratio 2.6667 "$@"
    train --seed "$seed" --output_dir "$out/polynorm" --mixer attn --mlp polynorm "$@"
    train --seed "$seed" --output_dir "$out/fan_mlp" --mixer attn --mlp fan --mlp_ratio 4.25 "$@"
    # fewer weights
    train --seed "$seed" --output_dir "$out/cola" --mixer attn --linear cola "$@"
    train --seed "$seed" --output_dir "$out/narrow" \
        --mixer attn --n_embd 96 --mlp_ratio 3.07 "$@"
    # another optimizer
    train --seed "$seed" --output_dir "$out/adamw" --mixer attn --optim adamw "$@"
    train --seed "$seed" --output_dir "$out/ademamix" --mixer attn --optim ademamix "$@"
    train --seed "$seed" --output_dir "$out/soap" --mixer attn --optim soap "$@"
    # the recipes
    train --seed "$seed" --output_dir "$out/recipe_fan" \
        --mixer fan --fan_ratio 0.15 --head_norm qkv --linear cola --norm hybrid_star \
        --residual gated --mlp swiglu --tie_embeddings --n_kv_head 2 --mlp_ratio 2.6667 "$@"
    train --seed "$seed" --output_dir "$out/recipe_neollm" \
        --mixer gdn,gdn,gdn,fan --gdn_chunk 64 --n_kv_head 2 --fan_ratio 0.125 \
        --mlp polynorm_gated --mlp_ratio 2 --norm lns --residual gpas --tie_embeddings \
        --no-pad_vocab --logit_softcap 0 --optim ademamix --adam_beta1 0.9 --adam_beta2 0.999 \
        --ademamix_alpha 5 --ademamix_beta3 0.999 --weight_decay 0.1 \
        --schedule cosine --lr_start 0.5 --lr_end 0.1 --learning_rate 0.003 "$@"
done
