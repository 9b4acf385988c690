"""From text to text: stops, samples, choices, streams; on a tiny model folder made on the spot."""

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from scipy.stats import chisquare

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
    predictor = Predictor(folder_of(), "cpu", torch.float32)
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


def test_a_stream_ends_with_the_answers_of_a_batch_and_its_pieces_are_the_first(base):
    together = base.answers(TEXTS, samples=3, **DRAWN)
    for number, text in enumerate(TEXTS):
        pieces, answers = finished(base.stream(text, number=number, samples=3, **DRAWN))
        assert "".join(pieces) == answers[0].text
        for answer, expected in zip(answers, together[number], strict=True):
            assert (answer.text, answer.ids) == (expected.text, expected.ids)
            np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-9)
    assert len({answer.text for answers in together for answer in answers}) == 9


def test_the_first_of_several_samples_is_streamed_and_the_prompt_encoded_once(base):
    read = []
    embedding = base.loaded.model.embedding.register_forward_hook(lambda _module, given, _output: read.append(given[0].numel()))
    stream = base.stream(TEXTS[0], samples=3, max_new_tokens=4)
    next(stream)
    assert len(read) <= 2, "it comes while the others are being written"
    finished(stream)
    embedding.remove()
    assert read == [len(base.prompt(TEXTS[0], 4)), 3, 3, 3]


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
    pieces, (streamed,) = finished(base.stream(TEXTS[0], stop=(stop,), **DRAWN))
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


CHOICES = [" of the", " sum", " matrix"]


def test_the_likeliest_choice_is_made_and_with_a_temperature_they_are_drawn_by_their_share(base):
    scores = base.choice_scores(TEXTS, CHOICES)
    greedy = base.choose(TEXTS, CHOICES)
    assert [choice.texts for choice in greedy] == [(CHOICES[best],) for best in scores.argmax(-1)]
    assert [list(choice.scores.values()) for choice in greedy] == scores.tolist()
    temperature, count = 3 * float(np.ptp(scores)), 4000
    for choice, row in zip(base.choose(TEXTS, CHOICES, temperature=temperature, samples=count), scores, strict=True):
        shares = np.exp(row / temperature) / np.exp(row / temperature).sum()
        assert chisquare([choice.texts.count(text) for text in CHOICES], shares * count).pvalue > 1e-4
        assert shares.max() / shares.min() > 1.2, "a draw in equal shares would be told apart"


def test_a_choice_is_drawn_by_seed_prompt_and_sample_alone(base):
    asked = {"temperature": 20.0, "samples": 20}
    together = base.choose(TEXTS, CHOICES, **asked)
    assert [base.choose([text], CHOICES, first=at, **asked)[0].texts for at, text in enumerate(TEXTS)] == [
        choice.texts for choice in together
    ]
    assert base.choose(TEXTS[:1], CHOICES, temperature=20.0, samples=7)[0].texts == together[0].texts[:7]
    assert base.choose(TEXTS[:1], CHOICES, seed=1, **asked)[0].texts != together[0].texts
    assert base.choose(TEXTS[:1], CHOICES, first=1, **asked)[0].texts != together[0].texts


def test_other_ways_to_draw_are_refused_beside_choices(base):
    for other in ({"top_k": 2}, {"stop": ("a",)}, {"max_new_tokens": 3}, {"repetition_penalty": 2.0}):
        with pytest.raises(SettingsError, match=f"^{next(iter(other))}: among given texts temperature, samples and seed alone"):
            base.choose(TEXTS, CHOICES, **other)
    with pytest.raises(GptcoreError, match="the choice ' sum' is given twice: give every text once"):
        base.choose(TEXTS, [*CHOICES, " sum"])


def test_a_choice_that_cannot_be_made_is_one_sentence(base):
    for choices, said in (([], "a choice is empty"), (["a", ""], "a choice is empty"), (["word " * 60], "leaves no room")):
        with pytest.raises(GptcoreError, match=said):
            base.choice_scores(TEXTS, choices)


def test_a_labeller_answers_with_the_likeliest_label_streamed_or_not(folder_of):
    task = {"type": "classify", "name": "topic", "labels": ["music", "weather"]}
    predictor = Predictor(folder_of(task), "cpu")
    labels = [task["labels"][best] for best in predictor.label_scores(TEXTS).argmax(-1)]
    assert predictor.predict(TEXTS) == labels
    assert [finished(predictor.stream(text))[1][0].text for text in TEXTS] == labels
    assert predictor.predict(TEXTS[:1], samples=2) == labels[:1] * 2


def test_of_a_long_text_a_base_reads_the_end_and_a_task_model_the_beginning(folder_of, base):
    text = "The array of values " * 40
    read, there = base.tokens_read(text, max_new_tokens=8)
    assert there == len(base.loaded.tokenizer.encode(text))
    assert base.prompt(text, 8)[1:] == base.loaded.tokenizer.encode(text)[-read:]
    task = Predictor(folder_of({"type": "summarize", "name": "s", "max_new_tokens": 8}), "cpu")
    read, there = task.tokens_read(text)
    assert task.prompt(text, 8)[2:-1] == base.loaded.tokenizer.encode(text)[:read]
    choices = ["a", "array of values"]
    read, there = base.tokens_read(text, choices)
    assert there > read == base.loaded.model.config.context - 1 - len(base.loaded.tokenizer.encode(choices[1]))
    labeller = Predictor(folder_of({"type": "classify", "name": "topic", "labels": choices}), "cpu")
    assert labeller.tokens_read(text) == (read - 3, there), "beside two roles and the end of the label"
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
    return model, kind.from_pretrained(tmp_path / "theirs"), Predictor(tmp_path / "ours" / "model", "cpu", torch.float32)


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
