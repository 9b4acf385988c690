"""A model folder -> one that `AutoModelForCausalLM` and `AutoTokenizer` open, compared with the model before it is there."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gptcore.artifacts import write_json
from gptcore.downstream import answer_room, chat_template, prompt_ids
from gptcore.errors import ModelFormatError
from gptcore.inference.generate import generate
from gptcore.model import GPT, LoadedModel, load_model, save_model
from gptcore.model.huggingface import export_model
from gptcore.model.quantisation import Int8Embedding, quantise, weight_bytes
from gptcore.tokens import Tokenizer, export_tokenizer

PARITY = "parity.json"
_CLOSE = 1e-4
"""Logits may differ by this much, relative to the largest of them; and the two best by less are no choice."""
_NEW_TOKENS = 24
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return {'a': [x, 1.5]}\n",
    "数据是文本，模型从中学习。",
    "  two  spaces\n\n\tand a tab\n",
    "naïve café, 12,345.67 € \u2014 \u201cquoted\u201d 🦊",
)


def export(folder: Path, target: Path, card: str = "") -> dict[str, Any]:
    """Write the model in `folder` to the new folder `target` as transformers loads it; returns what was compared.

    `card`: what is known of the model, as Markdown. Raises `ModelFormatError` where no architecture holds the model, `target`
    has something in it, or what transformers loads is another model.
    """
    loaded = load_model(folder, "cpu", torch.float32)
    tokenizer = loaded.tokenizer
    symbols = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    with _new_folder(target) as partial:
        architecture = export_model(loaded.model, partial, symbols)
        export_tokenizer(folder / "tokenizer", partial)
        found = {"architecture": architecture.name, **compare(loaded, partial)}
        found["prompts_compared"] = _add_template(loaded, partial)
        write_json(partial / PARITY, found)
        (partial / "README.md").write_text(_readme(loaded, card, bool(found["prompts_compared"])), encoding="utf-8")
    return found


def export_int8(folder: Path, target: Path) -> dict[str, Any]:
    """Write the model in `folder` to the new folder `target` with weights in eight bits; returns its megabytes, and before.

    Raises `ModelFormatError` where it has them already, or `target` has something in it.
    """
    loaded = load_model(folder, "cpu", torch.float32)
    if isinstance(loaded.model.embedding, Int8Embedding):
        raise ModelFormatError(f"{folder} has weights in eight bits already: copy the folder")
    before = weight_bytes(loaded.model)
    with _new_folder(target) as partial:
        save_model(partial, quantise(loaded.model), folder / "tokenizer", loaded.task)
    return {"path": str(target), "megabytes": weight_bytes(loaded.model) / 1e6, "megabytes_before": before / 1e6}


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, and is gone if there is none.

    Raises `ModelFormatError` where `target` has something in it or cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelFormatError(f"{target} is there already: name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelFormatError(f"cannot make the folder {target}: {error.strerror or error}") from error
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # it is to be handed on
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def compare(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """The logits, the greedy continuations and the token ids of a model and of what transformers opens in `folder`.

    Raises `ModelFormatError` where they differ.
    """
    import transformers  # takes seconds

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    masked = loaded.model.config.objective == "masked"
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    theirs, model = kind.from_pretrained(folder).eval(), loaded.model
    tokens = torch.randint(
        model.vocab_size, (2, min(model.config.context, 128)), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    ours, other = model(tokens), theirs(tokens).logits
    difference, largest = float((ours - other).abs().max()), float(ours.abs().max())
    if not difference <= _CLOSE * max(1.0, largest):
        raise ModelFormatError(f"what transformers opens in {folder} is another model: logits differ by {difference:.2g}")
    found: dict[str, Any] = {
        "logits_compared": ours.numel(), "largest_difference": difference, "largest_logit": largest,
        "transformers": transformers.__version__,
    }  # fmt: skip
    found["texts_compared"] = _same_ids(loaded.tokenizer, transformers.AutoTokenizer.from_pretrained(folder), _TEXTS)
    if not masked:
        found["greedy_tokens_compared"] = _same_continuations(model, theirs, tokens[:, : min(8, model.config.context // 2)])
    return found


def _same_ids(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> int:
    for text in texts:
        if ours.encode(text) != theirs.encode(text, add_special_tokens=False):
            raise ModelFormatError(f"the exported tokenizer gives other ids than the model's own for {text!r}")
    return len(texts)


def _add_template(loaded: LoadedModel, folder: Path) -> int:
    """Put the prompt of tasks into `tokenizer_config.json` as a chat template; returns in how many texts it was compared.

    A base without roles has none, and one that came with a template keeps that. Nor is there one where a tokenizer reads a text
    otherwise after a symbol, as those do that put a space before the first word only: 0.
    """
    import transformers

    ours, file = loaded.tokenizer, folder / "tokenizer_config.json"
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    speaks = ours.user_id != ours.begin_id and not theirs.chat_template
    if loaded.model.config.objective == "masked" or not (loaded.task or speaks):
        return 0
    ids = {"begin": ours.begin_id, "end": ours.end_id, "system": ours.system_id, "user": ours.user_id}
    ids["assistant"] = ours.assistant_id
    template = chat_template({name: theirs.convert_ids_to_tokens(token) for name, token in ids.items()})
    asked = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    same = all(
        theirs.apply_chat_template([{"role": "user", "content": text}], **asked) == prompt_ids(ours, text, sys.maxsize)
        for text in _TEXTS
    )
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)  # one that an imported tokenizer came with is not what the task was learned with
    write_json(file, {**settings, "chat_template": template} if same else settings)
    return len(_TEXTS) if same else 0


def _same_continuations(model: GPT, theirs: Any, prompts: torch.Tensor) -> int:
    room = min(_NEW_TOKENS, model.config.context - prompts.shape[1])
    ours = generate(model, prompts.tolist(), max_new_tokens=room)
    for prompt, new in zip(prompts, ours, strict=True):
        settings = {"max_new_tokens": room, "min_new_tokens": room, "do_sample": False, "eos_token_id": None}
        other = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **settings)[
            0, len(prompt) :
        ].tolist()
        at = next((index for index, (one, two) in enumerate(zip(new, other, strict=True)) if one != two), None)
        if at is None:
            continue
        logits = model(torch.tensor([[*prompt.tolist(), *new[:at]]], device="cpu"))[0, -1]
        if float(logits[new[at]] - logits[other[at]]) > _CLOSE * max(1.0, float(logits.abs().max())):
            raise ModelFormatError(f"what was exported continues otherwise than the model, at new token {at + 1}")
    return room * len(ours)


def _readme(loaded: LoadedModel, card: str, chats: bool) -> str:
    """The model card, with the lines at its beginning that hubs read."""
    masked = loaded.model.config.objective == "masked"
    kind, auto = ("fill-mask", "AutoModelForMaskedLM") if masked else ("text-generation", "AutoModelForCausalLM")
    shape = {name: value for name, value in loaded.model.config.model_dump(mode="json").items() if value is not None}
    return f"""---
library_name: transformers
pipeline_tag: {kind}
tags: [gptcore]
---

{card or "# A model made with gptcore"}

## With transformers

```python
from transformers import {auto}, AutoTokenizer

model, tokenizer = {auto}.from_pretrained("."), AutoTokenizer.from_pretrained(".")
{_asking(loaded) if loaded.task and chats else "" if masked else _continuing()}```

`{PARITY}` says how it was compared with the model that it was exported from. Its settings:

```json
{json.dumps(shape)}
```
"""


def _asking(loaded: LoadedModel) -> str:
    """Lines that ask the model."""
    assert loaded.task is not None
    room = answer_room(loaded.tokenizer, loaded.task)
    return f"""
prompt = [{{"role": "user", "content": "A text of yours."}}]
ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={room})[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def _continuing() -> str:
    """Lines that let a base go on with a text."""
    return """
ids = tokenizer("A text of yours", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0], skip_special_tokens=True))
"""
