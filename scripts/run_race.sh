# shellcheck shell=bash source-path=SCRIPTDIR
# Sourced by run_*.sh, which set
#   RACE      flags of the FineWeb race; empty: the small run is all, on any device
#   EMBEDDED  flags of the small run, on the text that is in the repository
#   SHARDS    training shards of 100M tokens to fetch
# and, where they differ from what stands here, REPO and DATA (where the shards are, and go), VOCAB
# (of the shards) and EXTRA (optional packages).
# Who runs them may set GPUS, of this machine, and for several machines torchrun's NNODES, NODE_RANK,
# MASTER_ADDR (of number 0) and MASTER_PORT. Number 0 writes the log, checkpoints and the sample;
# --resume reads the same path on all of them.
REPO=${REPO:-kjj0/fineweb10B-gpt2}
DATA=${DATA:-data/fineweb10B}
VOCAB=${VOCAB:-50257}
GPUS=${GPUS:-1}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK-}
MASTER_PORT=${MASTER_PORT:-29500}
CUDA12_TORCH=2.10.0                      # the last one that pip installs with CUDA 12
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# --------------------------------------------------------------------------------------------------
# What the user asks for

value_of() {                             # NAME, the value where no flag gives one, all flags
    local flag
    local name=--$1
    local value=$2
    local previous=
    shift 2
    for flag in "$@"; do                 # the last one counts, as argparse has it
        [[ $flag == "$name="* ]] && value=${flag#*=}
        [[ $previous == "$name" ]] && value=$flag
        previous=$flag
    done
    printf '%s' "$value"
}

only_tell=
for flag in "$@"; do
    case $flag in                        # no flag takes a value that begins with a dash
        -h | --help) exec "$python" "${here}train_gpt2.py" "$@" ;;
        --estimate) only_tell=1 ;;
        --no-estimate) only_tell= ;;
        --) fail "--: leave it out, all arguments are flags" ;;
    esac
done
device=$(value_of device auto "$@")
out=$(value_of output_dir logs "$@")
name=$(value_of run_name '' "$@")
resume=$(value_of resume '' "$@")
vocab=(--vocab_size "$VOCAB")            # for --estimate before there are shards
shards=(
    --input_bin "$here$DATA/*_train_*.bin"
    --input_val_bin "$here$DATA/*_val_*.bin"
)
if [[ $(value_of input_bin '' "$@")$(value_of input_val_bin '' "$@")$(value_of data '' "$@") ]]; then
    vocab=()                             # shards of your own: nothing is fetched
    shards=()
fi
some='^[1-9][0-9]{0,3}$'
[[ $GPUS =~ $some ]] || fail "GPUS=$GPUS: how many GPUs? Give a number, 1 or more"
[[ $NNODES =~ $some ]] || fail "NNODES=$NNODES: how many machines? Give a number, 1 or more"
if ((NNODES == 1)); then
    NODE_RANK=0
elif [[ ! $only_tell ]]; then
    if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]{0,3})$ ]] || ((NODE_RANK >= NNODES)); then
        fail "NODE_RANK=$NODE_RANK: which of $NNODES machines is this? Give 0 to $((NNODES - 1))"
    fi
    [[ ${MASTER_ADDR-} ]] || fail "MASTER_ADDR= is empty: give the address of machine 0, to all"
    if [[ ! $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((MASTER_PORT > 65535)); then
        fail "MASTER_PORT=$MASTER_PORT: give a port of machine 0 that is free, 1 to 65535, to all"
    fi
fi

# --------------------------------------------------------------------------------------------------
# What the machine can do. A GPU that torch cannot use ends the script: what would run without it is
# not what its owner wants.

gpu_is_there() {                         # and the user does not hide it
    [[ ${CUDA_VISIBLE_DEVICES-0} && ${CUDA_VISIBLE_DEVICES-0} != -1 ]] &&
        [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

why_not_cuda() {                         # in one line, and what mends it
    local driver                         # the CUDA that it is for; empty: it does not say
    local wanted
    local install="$python -m pip install"
    driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9.]*\).*/\1/p') || true
    wanted=$(sed -n 's/^torch==//p' "${here}requirements.txt")
    [[ $driver == 12.* ]] && wanted=$CUDA12_TORCH
    if [[ $torch_cuda == none ]]; then
        # The version may be the one that is there, of which pip would do nothing.
        echo "torch $torch_version is built without CUDA: $install --force-reinstall" \
            "'torch==$wanted'"
    elif [[ $torch_cuda == 13.* && ($driver == 12.* || -z $driver) ]]; then
        echo "torch $torch_version is built for CUDA $torch_cuda and the driver for" \
            "${driver:-an older one}: update the driver, or $install 'torch==$CUDA12_TORCH'"
    else
        "$python" -P -c 'import torch; torch.cuda.init()' 2>&1 | tail -n 1
    fi
}

on_cuda=
if [[ $device == auto || $device == cuda ]]; then
    if [[ $cuda_works == yes ]]; then
        on_cuda=1
    elif gpu_is_there; then
        fail "torch cannot use this machine's GPU, --device cpu does without: $(why_not_cuda)"
    fi
fi
run_race=
if [[ $on_cuda ]] && ((${#RACE[@]} > 0)); then
    run_race=1
fi

# --------------------------------------------------------------------------------------------------
# Run it

run() {                                  # prints a command as it can be typed, and runs it
    { printf '+'; printf ' %q' "$@"; echo; } >&2
    "$@"
}

as_last_process() (                      # checks as the last of GPUS would, so too many are refused
    export WORLD_SIZE=$((GPUS * NNODES)) RANK=0 LOCAL_RANK=$((GPUS - 1))
    "$@"
)

trainer=${here}train_gpt2.py
embedded_flags=("${EMBEDDED[@]}" "$@")
race_flags=(${vocab[@]+"${vocab[@]}"} ${RACE[@]+"${RACE[@]}"} "$@")

if [[ $only_tell && $run_race ]]; then
    as_last_process run "$python" "$trainer" "${race_flags[@]}"
    exit
fi
if [[ $only_tell ]]; then
    as_last_process run "$python" "$trainer" "${embedded_flags[@]}"
    if ((${#RACE[@]} > 0)); then
        echo
        echo "the race, on a machine with a CUDA GPU:"
        # Flags that fit the small run may contradict the race, which says so.
        run "$python" "$trainer" "${race_flags[@]}" --device cuda || true
    fi
    exit
fi

if [[ $run_race ]]; then
    # A wrong flag ends here, before anything is fetched.
    as_last_process "$python" "$trainer" "${race_flags[@]}" --estimate >/dev/null
    has tiktoken huggingface_hub || install tiktoken huggingface-hub
    if ((${#vocab[@]} > 0)); then
        # shellcheck disable=SC2153  # the script that sources this one sets it
        run "$python" "${here}data/fineweb.py" "$SHARDS" --repo "$REPO" --out "$here$DATA"
    fi
    flags=(${shards[@]+"${shards[@]}"} "${RACE[@]}" "$@")
else
    if ((${#RACE[@]} > 0)); then
        why="no CUDA device"
        [[ $cuda_works == yes ]] && why="--device $device"
        echo "$why: this is the embedded run (Tiny Shakespeare, byte by byte) instead of the" \
            "FineWeb race"
    fi
    flags=("${embedded_flags[@]}")
fi
checkpoint=$resume
if [[ ! $resume ]]; then                 # by a name of its own, so that the sample is this run's
    mixer=$(value_of mixer afno "${flags[@]}")
    [[ $name ]] || name=$(date -u +%Y%m%dT%H%M%S)_${mixer//,/-}_s$(value_of seed 0 "${flags[@]}")_$$
    flags+=(--run_name "$name")
    checkpoint=${out:-.}/$name/model.pt
fi
as_last_process "$python" "$trainer" "${flags[@]}" --estimate
torchrun=("$python" -P -m torch.distributed.run --nproc_per_node="$GPUS")
if ((NNODES > 1)); then
    launch=("${torchrun[@]}" --nnodes="$NNODES" --node_rank="$NODE_RANK"
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
elif ((GPUS > 1)); then
    launch=("${torchrun[@]}" --standalone)
else
    launch=("$python")
fi
run "${launch[@]}" "$trainer" "${flags[@]}"
((NODE_RANK == 0)) || exit 0             # the checkpoint is there
echo "a sample:"
if [[ $resume == auto ]]; then           # which went on wrote last
    # shellcheck disable=SC2012  # by time, which find cannot do everywhere
    checkpoint=$(ls -t "${out:-.}"/*/model.pt | head -n 1)
fi
run "$python" "${here}sample.py" "$checkpoint"
