"""What weights in fewer bits cost and bring.   python tests/benchmarks/fewer_bits.py MODEL TEXTS.jsonl.gz [--documents 200]

MODEL is a model folder, TEXTS has the column `text` and may have `split`, of which train is left out. For float32, weights in
half precision, bfloat16 and eight bits: bits per byte of the documents, megabytes of the weights in memory, tokens a second of
one text that is continued by 64 tokens, each the median of five turns. Prints JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pandas
import torch

from gptcore.evaluation.base import score_documents
from gptcore.inference.export import export_int8
from gptcore.inference.generate import generate
from gptcore.model import LoadedModel, load_model
from gptcore.model.quantisation import weight_bytes

NEW, TURNS = 64, 5


def bits_per_byte(loaded: LoadedModel, rows: pandas.DataFrame) -> float:
    scores = score_documents(loaded, rows)
    return float(scores["bits"].sum() / scores["bytes"].sum())


def seconds_of(loaded: LoadedModel) -> float:
    started = time.perf_counter()
    generate(loaded.model, loaded.tokenizer.encode("The"), max_new_tokens=NEW)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    asked = parser.parse_args()
    rows = pandas.read_json(asked.texts, lines=True)
    rows = rows[rows["split"] != "train"] if "split" in rows else rows
    rows = rows[: asked.documents].reset_index(drop=True).assign(source="texts", id=range(min(asked.documents, len(rows))))
    with tempfile.TemporaryDirectory() as folder:
        export_int8(asked.model, Path(folder) / "int8")
        kinds = {
            "float32": load_model(asked.model, "cpu", torch.float32),
            "float16 weights": load_model(asked.model, "cpu", torch.float16),
            "bfloat16": load_model(asked.model, "cpu", torch.bfloat16),
            "int8 weights": load_model(Path(folder) / "int8", "cpu", torch.float16),
        }
    turns = [{name: seconds_of(loaded) for name, loaded in kinds.items()} for _ in range(TURNS)]
    print(json.dumps({
        name: {
            "bits_per_byte": round(bits_per_byte(loaded, rows), 5), "megabytes": round(weight_bytes(loaded.model) / 1e6, 2),
            "tokens_per_second": round(NEW / statistics.median(turn[name] for turn in turns), 1),
        }
        for name, loaded in kinds.items()
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
