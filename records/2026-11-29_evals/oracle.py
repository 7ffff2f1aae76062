"""One random model as ours and as transformers' Llama: lm-eval's scores by evals.py and by its hf.

    python records/2026-11-29_evals/oracle.py DIR        # with the files that data/tasks.py lists
"""
import logging
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["hellaswag", "arc_easy", "arc_challenge", "mmlu_anatomy", "piqa", "lambada_openai"]
LIMIT = 50


def main():
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from share import harness
    from data.tasks import localise
    from sample import make_tokenizer
    from tests.test_evals import gpt2_tokenizer, llama_of, model_of

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = model_of(vocab_size=50257, n_embd=64, sequence_length=128, mlp="swiglu",
                     mlp_ratio=2.0, head_norm="none", embed_norm=False, logit_softcap=0.0)
    ours = harness.as_lm(model, make_tokenizer("gpt2", 50257), 16)
    theirs = HFLM(pretrained=llama_of(model), tokenizer=gpt2_tokenizer(), batch_size=16,
                  device="cpu", max_length=128)
    manager = TaskManager()
    found = []
    with tempfile.TemporaryDirectory() as work, redirect_stdout(sys.stderr):
        localise(manager.task_index, NAMES, Path(sys.argv[1]), Path(work), 1)
        for lm in ours, theirs:
            found.append(simple_evaluate(lm, tasks=NAMES, num_fewshot=1, limit=LIMIT,
                                         bootstrap_iters=0, task_manager=manager))
    print(f"{ours.asked} prompts, {ours.cut} longer than 128 tokens; lm-eval's hf behind the bar")
    for name in NAMES:
        samples = [found[i]["samples"][name] for i in range(2)]
        pairs = [(a, b) for mine, other in zip(*samples)
                 for a, b in zip(mine["filtered_resps"], other["filtered_resps"])]
        apart = max(abs(a[0] - b[0]) for a, b in pairs)
        largest = max(abs(b[0]) for _, b in pairs)
        scores = [" ".join(f"{key.split(',')[0]} {value:.6g}" for key, value in
                           found[i]["results"][name].items() if isinstance(value, float))
                  for i in range(2)]
        print(f"{name:16} {scores[0]} | {scores[1]}; {len(pairs)} log-probabilities to "
              f"{-largest:.0f}, at most {apart:.1e} apart, greedy alike: "
              f"{all(a[1] == b[1] for a, b in pairs)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
