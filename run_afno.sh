#!/usr/bin/env bash
# The causal AFNO-GPT race: three AFNO layers to one of attention, Muon, and the cheap tricks of the
# speedrun lineage. Its control is `./run_afno.sh --mixer attn`.
# Extra arguments pass through; --estimate shows what it costs; GPUS=N for more than one.
RACE=(
    --model d12
    --mixer 'afno,afno,afno,attn'
    --value_residual
    --x0_shortcut
    --unet_skips
    --optim muon
    --muon_learning_rate 0.02
    --weight_decay 0.01
    --learning_rate 0.002
    --embed_lr_scale 100
    --warmup_iters 0
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
EMBEDDED=(--target_val_loss 1.8857)      # where nanoGPT's CPU recipe ends
SHARDS=11                                # 1.05B tokens
source "$(dirname "$0")/scripts/run_race.sh"
