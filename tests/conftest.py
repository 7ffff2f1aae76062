import numpy as np
import pytest
import torch

# The tests' shapes are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two training shards and a validation shard of a language with 24 words, easy to learn."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, n in (("train_0", 3000), ("train_1", 2000), ("val", 400)):
        head = np.zeros(256, "<i4")
        head[:4] = 20240520, 1, n, 24
        steps = rng.choice([1, 2, 7], n, p=[0.7, 0.2, 0.1])
        tokens = (steps.cumsum() % 24).astype("<u2")
        (folder / f"{name}.bin").write_bytes(head.tobytes() + tokens.tobytes())
    return dict(input_bin=str(folder / "train_*.bin"), input_val_bin=str(folder / "val.bin"))
