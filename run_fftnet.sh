#!/usr/bin/env bash
# FFTNet, made causal (fftnet.py), on the embedded text and on any device. Sizes, norms, positions,
# dropout, weight decay and clipping are the defaults of its published implementation's main.py
# (github.com/mrorigo/pytorch-fftnet). What differs:
# - A GELU MLP follows the mixer, as in the paper, which replaces a transformer's attention.
#   The published implementation has no MLP.
# - Tokens are bytes, not cl100k_base: 100k tokens would make embedding and head nearly all of it.
# - Training and validation text are two files. Theirs are random draws from overlapping windows,
#   so most of the validation text was trained on.
# - 160 steps of 16 windows at 0.003, a third of the text once, for minutes on a CPU. Theirs are 30
#   epochs of every window at every offset, 64 a step, at 0.0001.
# - RMSNorm without gain or bias, except behind the sum; no biases; vectors and kernels do not
#   decay; Adam's second beta is 0.95; the rate is a trapezoid. All as elsewhere here.
# Extra arguments pass through: --fftnet_filter bank is the other filter; --estimate shows what it
# costs; GPUS=N for more than one.
RACE=()
EMBEDDED=(
    --mixer fftnet
    --fftnet_hidden 512
    --mlp gelu
    --norm pre_post
    --pos sinusoidal
    --embed_scale
    --no-embed_norm
    --logit_softcap 0
    --no-zero_init
    --n_layer 4
    --n_head 4
    --n_embd 128
    --dropout 0.1
    --optim adamw
    --learning_rate 0.003
    --weight_decay 0.01
    --grad_clip 1
    --batch_size 16
    --sequence_length 128
    --num_iterations 160
    --val_loss_every 40
)
source "$(dirname "$0")/scripts/run_race.sh"
