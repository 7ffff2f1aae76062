#!/usr/bin/env bash
# The causal AFNO-GPT race: three AFNO layers to one of attention, Muon, and the cheap tricks of the
# speedrun lineage. Its control is `./run_afno.sh --mixer attn`.
# Extra arguments pass through; --estimate shows what it costs; GPUS=N for more than one.
ATTENTION=(
    --n_head 6                           # heads of 128 channels: flash is faster than at 64
    --short_conv                         # as AFNO has, so that the control has it, too
)
if [[ " $* " =~ \ --mixer[=\ ](afno|fftnet|gdn|,)+\  ]]; then
    ATTENTION=()                         # there is none to read them
fi
RACE=(
    --model d12
    # No other places of attention ended more than 0.01 lower: records/2026-11-29_placement
    --mixer 'afno,afno,afno,attn'
    ${ATTENTION[@]+"${ATTENTION[@]}"}
    # The largest gain of the small races, for attention still more than for AFNO:
    # records/2026-11-29_what-the-lead-is
    --output_conv
    --value_residual
    --x0_shortcut
    --unet_skips
    # Rates of the tuned sweep of modded-nanogpt's third track: 3,250 steps where its first row, with
    # the rates that stood here, took 3,600. Its decay, 0.05, is for steps of twice the tokens. Its
    # vectors' 0.015 is left out: they are gains, ours are convolutions.
    --optim muon
    --muon_learning_rate 0.025
    # 0.016 in a small race: records/2026-11-29_gains
    --muon_row_beta 0.95
    # 0.008 there. Half batches early, 0.007, add nothing to it: records/2026-11-29_lookahead
    --lookahead 0.6
    --weight_decay 0.025
    --learning_rate 0.002
    --embed_lr_scale 350
    --head_lr_scale 2
    --adam_beta1 0.8
    --adam_eps 1e-10
    # 0.87B tokens. 4,000 steps would end near 3.35, and a run that crosses the target before its
    # learning rate is down has wasted what is left.
    --num_iterations 3300
    --warmup_iters 0
    --warmdown_iters 2300
    --batch_size 16
    --grad_accumulation_steps 16
    --sequence_length 1024
    --no-shuffle
    # The target is between two validations: 4% of the run if they are 125 steps apart.
    --val_loss_every 125
    --val_tail_every 25
    --train_loss_every 25
    --target_val_loss 3.3821
)
EMBEDDED=(
    --output_conv                        # 0.01 there: records/2026-11-29_face
    --muon_row_beta 0.95
    --warmup_iters 0                     # early steps count: it is about the time to the target
    --learning_rate 0.006
    --target_val_loss 1.8857             # where nanoGPT's CPU recipe ends
)
SHARDS=9                                 # 0.9B tokens
source "$(dirname "$0")/scripts/run_race.sh"
