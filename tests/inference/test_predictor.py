"""From text to text: stops, samples, choices, streams; on a tiny model folder made on the spot."""

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from gptcore.errors import GptcoreError, SettingsError
from gptcore.inference import Predictor
from gptcore.inference.reading import read_base
from gptcore.model import GPT, save_model
from gptcore.model.importing import find_original
from gptcore.tokens import Tokenizer

TEXTS = ["The array", "Return", "The mean of the values of the series is given by the sum of"]
DRAWN = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def folder_of(tiny, tmp_path_factory):
    """A function that makes a model folder: (task, **settings of the model)."""

    def make(task=None, **settings):
        tokenizer = tiny.tokenizer / "tokenizer"
        model = GPT(tiny.model(**settings), Tokenizer.load(tokenizer).vocabulary)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
        folder = tmp_path_factory.mktemp("model")
        save_model(folder, model, tokenizer, task)
        return folder

    return make


@pytest.fixture(scope="module")
def base(folder_of):
    predictor = Predictor(folder_of(), "cpu")
    predictor.loaded.model.double().compute_dtype = torch.float64
    return predictor


def finished(stream):
    """The pieces of a stream, and the answer that it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_a_stream_is_the_answer_of_a_batch(base):
    together = base.answers(TEXTS, samples=3, **DRAWN)
    for number, text in enumerate(TEXTS):
        for sample in range(3):
            pieces, answer = finished(base.stream(text, number=number, sample=sample, **DRAWN))
            assert "".join(pieces) == answer.text == together[number][sample].text
            assert answer.ids == together[number][sample].ids
            np.testing.assert_allclose(answer.logprobs, together[number][sample].logprobs, atol=1e-9)
    assert len({answer.text for answers in together for answer in answers}) == 9


def test_an_answer_does_not_depend_on_how_many_are_asked_for_together(base):
    many = [f"{text} {number}" for number in range(20) for text in TEXTS]
    answers = [answer.text for (answer,) in base.answers(many, **DRAWN)]
    assert base.predict(many[40:], first=40, **DRAWN) == answers[40:]


def test_samples_stand_one_after_another(base):
    flat = base.predict(TEXTS, samples=2, **DRAWN)
    assert flat == [answer.text for answers in base.answers(TEXTS, samples=2, **DRAWN) for answer in answers]
    assert flat[::2] == base.predict(TEXTS, **DRAWN)


def test_an_answer_ends_before_a_stop_text_that_may_span_tokens(base):
    (free,) = base.predict(TEXTS[:1], **DRAWN)
    stop = free[11:18]
    expected = free[: free.index(stop)]
    ((answer,),) = base.answers(TEXTS[:1], stop=(stop,), **DRAWN)
    assert (answer.text, answer.ended) == (expected, "stop")
    assert len(answer.ids) == len(answer.logprobs)
    pieces, streamed = finished(base.stream(TEXTS[0], stop=(stop,), **DRAWN))
    assert "".join(pieces) == expected
    assert streamed == answer


def test_logprobs_are_those_of_the_prompt_and_the_answer_read_as_one_text(base):
    ((answer,),) = base.answers(TEXTS[:1], max_new_tokens=12, temperature=0.8, top_k=5)
    prompt = base.prompt(TEXTS[0], 12)
    logits = base.loaded.model(torch.tensor([[*prompt, *answer.ids]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(answer.ids).unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=1e-9)
    assert answer.logprob == pytest.approx(float(expected.sum()))
    assert answer.ended == "length"


def test_a_choice_is_as_likely_as_its_tokens_after_the_prompt(base):
    choices = [" of the", " sum", " matrix and vector"]
    scores = base.choice_scores(TEXTS, choices)
    tokenizer, model = base.loaded.tokenizer, base.loaded.model
    for text, row in zip(TEXTS, scores, strict=True):
        for choice, score in zip(choices, row, strict=True):
            ids = tokenizer.encode(choice)
            prompt = base.prompt(text, max(len(tokenizer.encode(other)) for other in choices))
            likely = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            assert score == pytest.approx(sum(float(likely[at, token]) for at, token in enumerate(ids)), abs=1e-4)


def test_a_choice_that_cannot_be_made_is_one_sentence(base):
    for choices, said in (([], "a choice is empty"), (["a", ""], "a choice is empty"), (["word " * 60], "leaves no room")):
        with pytest.raises(GptcoreError, match=said):
            base.choice_scores(TEXTS, choices)


def test_a_labeller_answers_with_the_likeliest_label_streamed_or_not(folder_of):
    task = {"type": "classify", "name": "topic", "labels": ["music", "weather"]}
    predictor = Predictor(folder_of(task), "cpu")
    labels = [task["labels"][best] for best in predictor.label_scores(TEXTS).argmax(-1)]
    assert predictor.predict(TEXTS) == labels
    assert [finished(predictor.stream(text))[1].text for text in TEXTS] == labels
    assert predictor.predict(TEXTS[:1], samples=2) == labels[:1] * 2


def test_of_a_long_text_a_base_reads_the_end_and_a_task_model_the_beginning(folder_of, base):
    text = "The array of values " * 40
    read, there = base.tokens_read(text, max_new_tokens=8)
    assert there == len(base.loaded.tokenizer.encode(text))
    assert base.prompt(text, 8)[1:] == base.loaded.tokenizer.encode(text)[-read:]
    task = Predictor(folder_of({"type": "summarize", "name": "s", "max_new_tokens": 8}), "cpu")
    read, there = task.tokens_read(text)
    assert task.prompt(text, 8)[2:-1] == base.loaded.tokenizer.encode(text)[:read]
    assert base.tokens_read("The", max_new_tokens=8)[0] == base.tokens_read("The", max_new_tokens=8)[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stop": ("",)}, "stop is .*one character or more"),
        ({"samples": 0}, "samples is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temprature": 1.0}, "temprature is 1.0"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(base, wrong, said):
    with pytest.raises(SettingsError, match=said) as error:
        base.predict(TEXTS, **wrong)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- filling --


@pytest.fixture(params=["bert", "roberta"])
def encoder(request, tmp_path):
    """A random BERT or RoBERTa of transformers, and the model folder that it was imported into."""
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if request.param == "bert" else ["<s>", "<pad>", "</s>", "<mask>"]
    made = tokenizers.BertWordPieceTokenizer() if request.param == "bert" else tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, special_tokens=symbols, show_progress=False)
    (tmp_path / "theirs").mkdir()
    made.save_model(str(tmp_path / "theirs"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"max_position_embeddings": 80, "vocab_size": made.get_vocab_size()}
    config = transformers.AutoConfig.for_model(request.param, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:  # a bias of the head would tell more than the text
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "theirs")
    kind = transformers.BertTokenizer if request.param == "bert" else transformers.RobertaTokenizer
    (tmp_path / "ours").mkdir()
    find_original(str(tmp_path / "theirs"), tmp_path).convert(tmp_path / "ours")
    return model, kind.from_pretrained(tmp_path / "theirs"), Predictor(tmp_path / "ours" / "model", "cpu")


def test_an_imported_model_fills_in_what_transformers_does(encoder):
    model, tokenizer, predictor = encoder

    def filled(text, cut=0):
        read = tokenizer(text.replace("<|mask|>", tokenizer.mask_token), return_tensors="pt")["input_ids"]
        read = read[:, : read.shape[1] - cut]
        likeliest = torch.where(read == tokenizer.mask_token_id, model(read).logits.argmax(-1), read)
        return predictor.loaded.tokenizer.decode(likeliest[0].tolist())

    texts = [f"{one} <|mask|> of {two} <|mask|>" for one in ("The", "mean", "given", "sum") for two in ("array", "the", "is")]
    assert predictor.predict(texts) == [filled(text) for text in texts]
    assert predictor.predict(texts) != [filled(text, cut=1) for text in texts]  # the end of a text tells


def test_an_imported_model_reads_a_text_to_explain_as_transformers_does(encoder):
    _, tokenizer, predictor = encoder
    reading = read_base(predictor.loaded, TEXTS[2])
    assert reading.batch.tokens[0].tolist() == tokenizer(TEXTS[2])["input_ids"]
    assert list(reading.asked) == list(range(1, reading.batch.tokens.shape[1] - 1))
