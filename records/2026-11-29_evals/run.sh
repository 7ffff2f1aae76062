#!/usr/bin/env bash
# Writes again what the .txt files here hold: half an hour on one thread. EVAL names a folder with the
# files that data/tasks.py lists, SHARDS one with GPT-2 tokens, TEXT a held-out text, BYTES a run on
# bytes; PYTHON a Python that has torch, lm-eval[hf] and transformers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
here=records/2026-11-29_evals
four=hellaswag,arc_easy,arc_challenge,mmlu
size=(--data "$SHARDS" --output_dir logs --mixer afno,afno,attn,afno --sequence_length 512)

scored() {
    echo "\$ python evals.py $*"
    "$python" evals.py "$@"
    echo
}

"$python" train_gpt2.py "${size[@]}" --run_name gpt2_tokens --batch_size 4 --minutes 9 \
    --val_tokens 32768 --val_batch_size 4 --val_loss_every 0 --save_every 0
"$python" train_gpt2.py "${size[@]}" --run_name untrained --batch_size 1 --num_iterations 1 \
    --no-zero_init --learning_rate 0 --muon_learning_rate 0 --val_tokens 512 --val_batch_size 1 \
    --warmup_iters 0 --warmdown_iters 0
{
    scored logs/gpt2_tokens --tasks $four --num_fewshot 1 --limit 100 --data "$EVAL" --batch_size 16
    scored logs/gpt2_tokens --tasks piqa,lambada_openai --limit 100 --data "$EVAL"
} > $here/gpt2_tokens.txt
{
    scored logs/untrained --tasks $four --num_fewshot 1 --limit 100 --data "$EVAL" --batch_size 16
    scored logs/untrained --tasks arc_easy,arc_challenge --num_fewshot 1 --data "$EVAL"
} > $here/untrained.txt
scored "$BYTES" --tasks hellaswag,arc_easy --num_fewshot 1 --limit 100 --data "$EVAL" > $here/bytes.txt
for run in logs/gpt2_tokens logs/untrained "$BYTES"; do
    scored "$run" --text "$TEXT"
done > $here/text.txt
{
    echo "\$ python $here/oracle.py $EVAL"
    "$python" $here/oracle.py "$EVAL"
} > $here/oracle.txt
{
    echo "\$ python $here/lengths.py $EVAL"
    "$python" $here/lengths.py "$EVAL"
} > $here/lengths.txt
