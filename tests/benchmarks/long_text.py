"""What the last of 2,000 new tokens costs beside the first.   python tests/benchmarks/long_text.py [PRESET]

Two texts grow in turns, one from its beginning and one from its 1,950th token on, so that whatever else the machine does
slows both. Prints the median seconds of a step of each and their ratio, as JSON.
"""

import argparse
import json
import statistics
import time

import torch

from gptcore.config import preset
from gptcore.inference.rows import Rows
from gptcore.model import GPT
from gptcore.model.folder import fastest_dtype, ready

LAST, STEPS, VOCABULARY = 2_000, 50, 50_257


def seconds_of_a_step(rows: Rows) -> float:
    for number, token in enumerate(rows.logits.argmax(-1).tolist()):
        rows.texts[number].append(token)
    started = time.perf_counter()
    rows.advance(())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="gpt2", help="shape of the model; its context becomes 2,048")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="unset: the fastest here")
    asked = parser.parse_args()
    config = preset(asked.preset).model_copy(update={"context": 2048})
    model = GPT(config, VOCABULARY, device="cpu").initialise(0)
    dtype = getattr(torch, asked.dtype) if asked.dtype else fastest_dtype(model)
    model = ready(model, dtype)
    first, last = (Rows(model, [[5] * length for _ in range(asked.batch)], 1, LAST) for length in (1, LAST - STEPS))
    pairs = [(seconds_of_a_step(first), seconds_of_a_step(last)) for _ in range(STEPS)]
    one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    threads = torch.get_num_threads()
    print(json.dumps({"preset": asked.preset, "batch": asked.batch, "dtype": str(dtype), "threads": threads,
                      "first": one, "last": other, "ratio": other / one}))  # fmt: skip


if __name__ == "__main__":
    main()
