"""Short documents out of long ones: paragraphs of 100 to 500 bytes, shuffled, one a line.

    python documents.py BOOKS.txt.bz2 BYTES OUT.txt

A blank line ends a paragraph, and its lines are joined. Each is taken once, in an order drawn with
seed 0, until there are BYTES of them: neighbours have nothing to do with each other. A newline
begins each, and no other is in it: --document_token 10.
"""
import bz2
import random
import re
import statistics
import sys

books, wanted, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with bz2.open(books, "rt", encoding="utf-8") as file:
    text = file.read()
pieces = re.split(r"\n(?:[^\S\n]*\n)+|<\|endoftext\|>", text)
lines = dict.fromkeys(" ".join(piece.split()) for piece in pieces)
short = [line for line in lines if 100 <= len(line.encode()) <= 500]
random.Random(0).shuffle(short)
sizes = []
with open(out, "w", encoding="utf-8", newline="") as file:
    for line in short:
        if sum(sizes) >= wanted:
            break
        file.write(f"\n{line}")
        sizes.append(1 + len(line.encode()))
print(f"{out}: {len(sizes):,} documents of {len(short):,}, {sum(sizes):,} bytes; a document has "
      f"{statistics.mean(sizes):.0f} on average, {statistics.median(sizes):.0f} in the middle")
