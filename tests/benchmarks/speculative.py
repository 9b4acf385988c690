"""Does a small draft model make greedy generation faster?   python tests/benchmarks/speculative.py [TARGET DRAFT TEXTS]

Speculative decoding (Leviathan et al. 2023): the draft model writes some tokens; the target reads them in one call, keeps those
that it would have written itself and adds one of its own. TARGET and DRAFT are model folders with the same tokenizer, TEXTS is
the test.parquet of a corpus. The beginnings of its texts are continued without a draft and with drafts of several lengths, in
turns; where that is not what `generate` gives, the two best tokens must be a tie. Alone, it tells what rounds cost at the shape
of GPT-2 with a draft of 4 layers x 256 and random weights.

Columns: tokens of a draft; milliseconds of a plain step, and of drafting and checking in one round; `needed`, the share of the
drafted tokens from which on it pays, and `alpha`, the chance of each that gives this share if it is the same for all (their
section 3.1; NaN: it never pays). Of models also the share that was accepted, tokens a second, and the median of the ratios.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas
import torch

from gptcore.config import ModelConfig, preset
from gptcore.inference import generate
from gptcore.inference.rows import prefill
from gptcore.model import GPT, Cache, load_model
from gptcore.model.folder import ready
from gptcore.model.quantisation import packs

LENGTHS, PROMPT, NEW, TIE = (2, 3, 4, 6), 32, 200, 1e-4
HELD, ROUNDS, VOCABULARY = 256, 40, 50_257
DTYPE = torch.float16 if packs() else torch.float32


@dataclass
class Tally:
    """What one way of decoding came to: tokens; seconds of drafting and of checking in each round; seconds of each text."""

    drafted: int = 0
    accepted: int = 0
    rounds: list[tuple[float, float]] = field(default_factory=list)
    texts: list[float] = field(default_factory=list)


@torch.no_grad()
def read(model: GPT, cache: Cache, tokens: list[int]) -> list[int]:
    """The likeliest token after each of `tokens`, which follow what the cache holds."""
    return model(torch.tensor([tokens], device="cpu"), cache)[0].argmax(-1).tolist()


def decode(target: GPT, draft: GPT, prompt: list[int], length: int, tally: Tally) -> list[int]:
    """`NEW` tokens after the prompt; a `length` of 0 is plain greedy decoding, in rounds that only check."""
    text, end = list(prompt), len(prompt) + NEW
    known = prefill(target, [prompt[:-1]], end)[0]
    guessed = prefill(draft, [prompt[:-1]], end)[0] if length else known
    while len(text) < end:
        ahead, began = list(text), time.perf_counter()
        for _ in range(min(length, end - len(text) - 1)):
            ahead += read(draft, guessed, ahead[guessed.length :])[-1:]
        drafted = time.perf_counter()
        likeliest, guesses = read(target, known, ahead[known.length :]), ahead[len(text) :]
        checked = time.perf_counter()
        accepted = next((place for place, guess in enumerate(guesses) if guess != likeliest[place]), len(guesses))
        text += likeliest[: accepted + 1]
        # The last token was read by neither; after a draft that was accepted whole the draft model has not read two.
        known.rewind(len(text) - 1)
        guessed.rewind(min(guessed.length, len(text) - 1))
        tally.drafted, tally.accepted = tally.drafted + len(guesses), tally.accepted + accepted
        tally.rounds.append((drafted - began, checked - drafted))
    return text[len(prompt) :]


def tie(target: GPT, prompt: list[int], wanted: list[int], got: list[int]) -> bool:
    """Whether the two differ, which may begin only where the two best tokens are as good as equal."""
    place = next((place for place, pair in enumerate(zip(wanted, got, strict=True)) if pair[0] != pair[1]), None)
    if place is None:
        return False
    best, second = target(torch.tensor([prompt + wanted[:place]], device="cpu"))[0, -1].topk(2).values.tolist()
    assert best - second < TIE, f"token {place} is {got[place]} instead of {wanted[place]}, better by {best - second}"
    return True


def needed(length: int, plain: float, drafting: float, checking: float) -> dict[str, float]:
    """What must be accepted for the 1 + length x share tokens of a round to be more than plain steps give in its seconds."""
    cost = (drafting + checking) / plain
    enough = (share / 1000 for share in range(1001) if sum((share / 1000) ** place for place in range(length + 1)) > cost)
    return {
        "length": length, "plain": 1e3 * plain, "drafting": 1e3 * drafting, "checking": 1e3 * checking,
        "needed": (cost - 1) / length, "alpha": next(enough, float("nan")),
    }  # fmt: skip


def measure(target: GPT, draft: GPT, prompts: list[list[int]]) -> list[dict[str, float]]:
    """Continue every prompt in every way."""
    decode(target, draft, prompts[0], 4, Tally())  # the first calls are slow
    tallies, ties = {length: Tally() for length in (0, *LENGTHS)}, 0
    for prompt in prompts:
        (wanted,) = generate(target, [prompt], max_new_tokens=NEW)
        for length, tally in tallies.items():
            began = time.perf_counter()
            got = decode(target, draft, prompt, length, tally)
            tally.texts.append(time.perf_counter() - began)
            ties += tie(target, prompt, wanted, got)
    print(f"{len(prompts)} texts in {len(tallies)} ways, {ties} of them went on otherwise than `generate` after a tie")
    plain, rows = tallies.pop(0), []
    for length, tally in tallies.items():
        ratio = statistics.median(one / other for one, other in zip(plain.texts, tally.texts, strict=True))
        speeds = {way: NEW / statistics.median(each.texts) for way, each in (("plain/s", plain), ("speculative/s", tally))}
        costs = (medians(plain.rounds)[1], *medians(tally.rounds))
        rows.append(needed(length, *costs) | {"accepted": tally.accepted / tally.drafted, **speeds, "ratio": ratio})
    return rows


def price(target: GPT, draft: GPT) -> list[dict[str, float]]:
    """What rounds cost after `HELD` tokens, in turns."""
    known, guessed = (prefill(model, [[5] * HELD], HELD + max(LENGTHS) + 1)[0] for model in (target, draft))
    spent: dict[int, list[tuple[float, float]]] = {length: [] for length in (0, *LENGTHS)}
    for _ in range(ROUNDS):
        for length, rounds in spent.items():
            began = time.perf_counter()
            for _ in range(length):
                read(draft, guessed, [5])
            drafted = time.perf_counter()
            read(target, known, [5] * (length + 1))
            rounds.append((drafted - began, time.perf_counter() - drafted))
            known.rewind(HELD)
            guessed.rewind(HELD)
    return [needed(length, medians(spent[0])[1], *medians(spent[length])) for length in LENGTHS]


def medians(rounds: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(part) for part in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="TARGET DRAFT TEXTS", help="two model folders and a .parquet")
    parser.add_argument("--texts", type=int, default=12, help="how many are continued")
    asked = parser.parse_args()
    if asked.files:
        (target, draft), texts = (load_model(folder, "cpu", DTYPE) for folder in asked.files[:2]), asked.files[2]
        assert target.tokenizer.digest == draft.tokenizer.digest, "the models have different tokenizers"
        encoded = (target.tokenizer.encode(text) for text in pandas.read_parquet(texts)["text"])
        prompts = [ids[:PROMPT] for ids in encoded if len(ids) >= PROMPT][: asked.texts]
        rows = measure(target.model, draft.model, prompts)
    else:
        small = ModelConfig(**preset("gpt2").model_dump() | {"layers": 4, "width": 256, "heads": 4})
        rows = price(*(ready(GPT(shape, VOCABULARY, device="cpu").initialise(0), DTYPE) for shape in (preset("gpt2"), small)))
    print(f"{torch.get_num_threads()} threads\n{pandas.DataFrame(rows).round(3).to_string(index=False)}")


if __name__ == "__main__":
    main()
