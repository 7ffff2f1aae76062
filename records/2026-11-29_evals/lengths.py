"""What answers score that are chosen by their lengths alone, in GPT-2's tokens: no model at all.

    python records/2026-11-29_evals/lengths.py DIR          # with the files that data/tasks.py lists
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    from data import tasks
    from sample import make_tokenizer

    encode = make_tokenizer("gpt2", 50257).encode
    for config in "ARC-Easy", "ARC-Challenge":
        kind = tasks.LOCAL["ai2_arc", config]
        path = tasks.find(Path(sys.argv[1]), kind.asked)
        rows = tasks.read(path, kind.fields)
        fewest = densest = 0
        for row in rows:
            texts = row["choices"]["text"]
            right = row["choices"]["label"].index(row["answerKey"])
            sizes = [len(encode(f" {text}")) for text in texts]
            rates = [size / len(text) for size, text in zip(sizes, texts)]
            fewest += sizes.index(min(sizes)) == right
            densest += rates.index(min(rates)) == right
        print(f"{path.name}: {len(rows)} rows, the fewest tokens {fewest / len(rows):.4f}, the "
              f"fewest tokens a letter {densest / len(rows):.4f}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
