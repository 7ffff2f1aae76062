#!/usr/bin/env bash
# The lab on what is published: NAME.json each. transformers, packages, spectral, ours: some alone.
# PYTHON has transformers and, for the packages, what packages.txt names; spectrans needs Python
# 3.13, which PYTHON_313 is.
set -uo pipefail
cd "$(dirname "$0")" || exit
lab=../../test_causality.py
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1

look() {                                 # NAME, then arguments of the lab
    local name=$1
    shift
    echo "$name" >&2
    "$python" "$lab" "$@" --T 151 --json >"$name.json"
    # 1 is a leak, and no failure of the lab.
    [[ $? -le 1 ]] || rm "$name.json"
}

transformers() {
    local name
    for name in gpt2 openai-gpt gpt_neox llama qwen2 ctrl minimax lfm2 olmo_hybrid rwkv mamba \
        mamba2 falcon_mamba fnet; do
        look "$name" --hf "$name"
    done
    look qwen3_next --hf qwen3_next --kwargs '{"num_hidden_layers": 4}'
    look recurrent_gemma --hf recurrent_gemma --kwargs '{"num_hidden_layers": 3}'
    look xlstm --hf xlstm --kwargs '{"qk_dim_factor": 1.0}'
    look bert --hf bert
    look bert_decoder --hf bert --kwargs '{"is_decoder": true}'
}

packages() {
    local name
    for name in gmlp aft_full aft_simple gss dsconv exponential_smoothing gateloop \
        simple_gateloop mega x_transformer performer topogpt topogpt_no_window axiom; do
        look "$name" "subjects.py:$name"
    done
    look performer_as_is subjects.py:performer --as_is
}

spectral() {
    local name
    python=${PYTHON_313:-python3.13}
    for name in fno_decoder lst_decoder wavelet_decoder; do
        look "$name" "subjects.py:$name"
    done
    python=${PYTHON:-python3}
}

ours() {
    local name
    for name in ZeroPaddedAFNO WholeWindowFFTNet InvertedMask UnmaskedDiff; do
        look "$name" "../../tests/published.py:$name" --kwargs '{"dim": 32}'
    done
}

for part in "${@:-transformers packages spectral ours}"; do
    for each in $part; do
        "$each"
    done
done
