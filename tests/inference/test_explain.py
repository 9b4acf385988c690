"""What is told of a model is what its logits, its attention and its gradients are, computed here another way."""

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gptcore.inference.explain as explaining
from gptcore.errors import GptcoreError
from gptcore.evaluation.likelihood import stream_nats
from gptcore.inference import Predictor
from gptcore.inference.attribution import attribute, scores
from gptcore.inference.explain import explain, open_model
from gptcore.inference.explain_page import explanation_page, quantised
from gptcore.inference.export import export_int8
from gptcore.inference.reading import whole_characters
from gptcore.model import GPT, save_model
from gptcore.model.inputs import Inputs
from gptcore.model.quantisation import rounded
from gptcore.model.transformer import attention_weights
from gptcore.tokens import Tokenizer
from gptcore.tokens.objectives import IGNORED, Symbols

TEXT = "The array sorts the index of 数据, given a date."


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A function that writes a model folder of lively random weights."""

    def write(task=None, **settings):
        folder = tmp_path_factory.mktemp("explained") / "model"
        tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
        model = GPT(tiny.model(**{"context": 64, **settings}), tokenizer.vocabulary).initialise(0)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel()))
        save_model(folder, model, tiny.tokenizer / "tokenizer", task)
        return folder

    return write


@pytest.fixture(scope="module")
def opened(written):
    """The same, opened."""
    return lambda task=None, **settings: open_model(written(task, **settings))


CLASSIFY = {"type": "classify", "name": "topic", "labels": ["dates", "plots", "array index"]}


# ------------------------------------------------------------------------------------------------ probabilities --


def test_a_token_has_the_probability_that_the_softmax_of_the_logits_gives_it(opened):
    loaded = opened()
    found = explain(loaded, TEXT, points=0)
    logits = loaded.model(torch.tensor([found.ids]))[0].double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert sorted(found.predictions) == list(range(1, len(found.ids)))
    for place, prediction in found.predictions.items():
        before = shares[place - 1]
        assert 2**-prediction.bits == pytest.approx(before[found.ids[place]], rel=1e-4)
        assert prediction.rank == 1 + (before > before[found.ids[place]]).sum()
        assert [guess.probability for guess in prediction.likeliest] == pytest.approx(np.sort(before)[:-11:-1], rel=1e-4)
    assert found.next[0].probability == pytest.approx(shares[-1].max())
    assert found.bytes == len(TEXT.encode())


@pytest.mark.parametrize("objective", ["causal", "prefix"])
def test_the_bits_of_a_text_are_those_that_the_evaluation_measures(opened, objective):
    loaded = opened(objective=objective)
    stream = np.array([loaded.tokenizer.begin_id, *loaded.tokenizer.encode(TEXT)])
    nats = stream_nats(loaded.model, stream, Symbols.of(loaded.tokenizer))
    found = explain(loaded, TEXT, points=0)
    assert [prediction.bits for prediction in found.predictions.values()] == pytest.approx(nats[1:] / math.log(2), rel=1e-4)


def test_a_masked_model_is_asked_for_each_token_when_it_alone_is_hidden(opened):
    loaded = opened(objective="masked")
    found = explain(loaded, TEXT, points=0)
    for place, prediction in found.predictions.items():
        hidden = torch.tensor([[*found.ids[:place], loaded.tokenizer.mask_id, *found.ids[place + 1 :]]])
        logits = loaded.model(hidden)[0, place]
        assert prediction.bits == pytest.approx(-logits.log_softmax(-1)[found.ids[place]].item() / math.log(2), rel=1e-4)
    assert (found.kind, found.next) == ("fill", ())


@pytest.mark.parametrize("objective", ["causal", "prefix"])
def test_a_classifier_tells_the_scores_it_answers_by_and_what_speaks_for_each_label(written, objective):
    folder = written(CLASSIFY, objective=objective)
    loaded, predictor = open_model(folder), Predictor(folder)
    predictor.loaded = loaded  # in float32 on every machine
    wanted = dict(zip(CLASSIFY["labels"], predictor.label_scores([TEXT])[0], strict=True))
    found = explain(loaded, TEXT)
    assert {label.label: label.nats for label in found.labels} == pytest.approx(wanted, rel=1e-5)
    assert [label.nats for label in found.labels] == sorted((label.nats for label in found.labels), reverse=True)
    assert found.bits == pytest.approx(-found.labels[0].nats / math.log(2), rel=1e-4)
    shares = np.exp(list(wanted.values())) / np.exp(list(wanted.values())).sum()
    for label, share in zip(found.labels, sorted(shares, reverse=True), strict=True):
        assert label.probability == pytest.approx(share, rel=1e-5)
        gained = math.log2(share) - label.carried.blank
        assert label.carried.bits.sum() + label.carried.missed == pytest.approx(gained, abs=2e-3)
        assert abs(label.carried.missed) <= max(0.1, 0.1 * abs(gained))
    assert sum(2**label.carried.blank for label in found.labels) == pytest.approx(1.0)


def test_a_summary_is_explained_token_by_token(opened):
    loaded = opened({"type": "summarize", "name": "summary", "max_new_tokens": 6})
    found = explain(loaded, TEXT)
    assert found.kind == "summarize"
    assert all(prediction.rank == 1 for prediction in found.predictions.values())  # greedy
    assert max(found.predictions) == len(found.ids) - 1


# --------------------------------------------------------------------------------------------------- attention --


def attention_by_hand(model: GPT, ids: list[int]) -> np.ndarray:
    """Attention of the first block (H, T, T), from its weights and in numpy."""
    weights = {name: weight.double().numpy() for name, weight in model.named_parameters()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_epsilon) * weights[name]

    def turned(x):  # (T, K): each pair (i, i + K/2) by its angle
        half = x.shape[1] // 2
        angle = np.outer(np.arange(len(ids)), model.config.rope_theta ** (-np.arange(half) / half))
        left, right = x[:, :half], x[:, half:]
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], 1)

    size, block = model.config.size_of_head, "blocks.0.attention"
    x = norm(weights["embedding.weight"][ids], "blocks.0.attention_norm.weight")
    shared = model.config.heads // model.config.key_value_heads
    maps = []
    for head in range(model.config.heads):
        q = x @ weights[f"{block}.query.weight"][head * size : (head + 1) * size].T
        k = x @ weights[f"{block}.key.weight"][head // shared * size : (head // shared + 1) * size].T
        q, k = turned(norm(q, f"{block}.query_norm.weight")), turned(norm(k, f"{block}.key_norm.weight"))
        scores = np.where(np.tri(len(ids), dtype=bool), q @ k.T / np.sqrt(size), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(shares / shares.sum(-1, keepdims=True))
    return np.stack(maps)


def test_attention_is_the_softmax_of_queries_and_keys(opened):
    loaded = opened()
    found = explain(loaded, TEXT, points=0)
    assert found.attention.shape == (2, 4, len(found.ids), len(found.ids))
    np.testing.assert_allclose(found.attention[0], attention_by_hand(loaded.model, found.ids), atol=1e-5)


@pytest.mark.parametrize("objective", ["causal", "masked", "prefix"])
def test_attention_sums_to_one_and_gives_what_the_model_computes_with(opened, objective):
    loaded = opened(objective=objective)
    given, attend = [], loaded.model.blocks[1].attention.attend
    handle = attend.register_forward_hook(lambda _, args, rule, out: given.append((*args, rule, out)), with_kwargs=True)
    found = explain(loaded, TEXT, points=0)
    handle.remove()
    q, k, v, mask, rule, out = given[0]
    np.testing.assert_allclose(found.attention.sum(-1), 1.0, rtol=1e-5)
    mixed = attention_weights(q, k, mask, **rule) @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(mixed, out, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(found.attention[1], attention_weights(q, k, mask, **rule)[0], atol=1e-6)
    assert objective != "causal" or not np.triu(found.attention[0, 0], 1).any()


def test_of_too_many_maps_those_between_the_newest_tokens_are_kept(opened, monkeypatch):
    loaded = opened()
    whole = explain(loaded, TEXT, points=0)
    monkeypatch.setattr(explaining, "_MAP_BYTES", 8 * 10 * 10)
    found = explain(loaded, TEXT, points=0)
    np.testing.assert_array_equal(found.attention, whole.attention[:, :, -10:, -10:])
    assert found.left_out == (f"Attention is shown between the newest 10 of {len(found.ids)} tokens.",)


def test_weights_kept_as_bytes_are_off_by_less_than_half_a_percent():
    weights = np.linspace(0, 1, 100_001, dtype=np.float32)
    kept = (np.frombuffer(quantised(weights), np.uint8) / 255) ** 2
    assert abs(kept - weights).max() <= 0.004


# ------------------------------------------------------------------------------------------------ attributions --


@pytest.fixture
def asked(tiny):
    """A model in float64 with all that reads tokens, a text of different tokens, and the score of its last one."""
    model = GPT(tiny.model(tied=False, value_embeddings=True, smear=True, embedding_norm=True), 60).initialise(0)
    for number, weight in enumerate(model.parameters()):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(number))
    model.compute_dtype = torch.float64
    model = model.double().requires_grad_(False)
    tokens, labels = torch.tensor([[1, 7, 12, 30, 44, 5]]), torch.full((1, 6), IGNORED)
    labels[0, 5] = 9
    spoken = torch.arange(60) > 3
    return model, Inputs(tokens, labels), spoken[tokens], spoken


def along(model: GPT, rows: Inputs, spoken: torch.Tensor, shares: torch.Tensor) -> float:
    """The score when the rows of the tables that tokens 7, 12, … read stand at `shares` of the way from the mean."""
    tables = [model.embedding, *model.values]
    before = [table.weight.clone() for table in tables]
    for table, weight in zip(tables, before, strict=True):
        mean, ids = weight[spoken].mean(0), rows.tokens[0, 1:]
        table.weight[ids] = mean + shares[:, None] * (weight[ids] - mean)
    score = scores(model, rows).item()
    for table, weight in zip(tables, before, strict=True):
        table.weight.copy_(weight)
    return score


def slopes(model, rows, spoken, share):
    """How the score changes as each token alone goes on, by differences (5)."""
    step, here = 1e-5, torch.full((5,), share, dtype=torch.float64)
    ways = torch.eye(5, dtype=torch.float64) * step
    return [(along(model, rows, spoken, here + way) - along(model, rows, spoken, here - way)) / (2 * step) for way in ways]


def test_one_point_is_the_gradient_times_the_input(asked):
    model, rows, text, spoken = asked
    found = attribute(model, rows, text, spoken, 1)
    assert found.bits[0, 0] == 0  # the control symbol
    assert found.bits[0, 1:].tolist() == pytest.approx(slopes(model, rows, spoken, 1.0), rel=1e-5, abs=1e-7)


def test_more_points_are_the_integral_of_the_gradient_and_its_sum_is_complete(asked):
    model, rows, text, spoken = asked
    found = attribute(model, rows, text, spoken, 64)
    middles = (np.arange(50) + 0.5) / 50
    summed = np.mean([slopes(model, rows, spoken, share) for share in middles], axis=0)
    assert found.bits[0, 1:].tolist() == pytest.approx(summed, abs=0.05)
    blank = along(model, rows, spoken, torch.zeros(5, dtype=torch.float64))
    assert (found.score.item(), found.blank.item()) == pytest.approx((scores(model, rows).item(), blank))
    assert found.bits.sum().item() == pytest.approx(found.score.item() - blank, abs=1e-3)


@pytest.mark.parametrize("objective", ["causal", "masked", "prefix"])
def test_what_the_tokens_carried_adds_up_to_what_the_text_changed(opened, objective):
    found = explain(opened(objective=objective), TEXT)
    for place, prediction in found.predictions.items():
        carried = prediction.carried
        gained = -prediction.bits - carried.blank
        assert carried.bits.sum() + carried.missed == pytest.approx(gained, abs=2e-3)
        assert abs(carried.missed) <= max(0.1, 0.1 * abs(gained))
        assert carried.bits[place] == 0  # nothing speaks for itself
        assert objective == "masked" or not carried.bits[place:].any()


def test_only_the_newest_predictions_are_attributed(opened, monkeypatch):
    monkeypatch.setattr(explaining, "_ATTRIBUTED", 3)
    found = explain(opened(), TEXT)
    last = len(found.ids) - 1
    assert [place for place, each in found.predictions.items() if each.carried] == [last - 2, last - 1, last]
    assert found.left_out == (f"Attributions are those of the newest 3 of {last} predictions.",)


# ---------------------------------------------------------------------------------------------------- the text --


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_whole_characters_spell_the_text(tiny, text):
    tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
    ids = tokenizer.encode(text)
    found = whole_characters(tokenizer, ids)
    assert [begin for begin, _, _ in found] == [0, *(end for _, end, _ in found)][: len(found)]
    if not {"\ufffd", *"\ufdd0\ufdd1\ufdd2\ufdd3"}.intersection(text):
        assert "".join(written for _, _, written in found) == text


def test_of_a_text_longer_than_the_context_the_newest_whole_characters_are_read(opened):
    loaded = opened()
    text = "word " * 40 + "数据" * 15
    found = explain(loaded, text, points=0)
    assert 60 <= len(found.ids) <= 64
    read = "".join(written for _, _, written in found.characters[1:])
    assert text.endswith(read)
    assert found.bytes == len(read.encode())
    assert f"its newest {len(found.ids) - 1} of {len(loaded.tokenizer.encode(text))} tokens are read" in found.left_out[0]


def test_a_task_reads_the_beginning_of_what_is_too_long_as_in_training(opened):
    found = explain(opened(CLASSIFY), "word " * 200, points=0)
    assert len(found.ids) <= 64
    assert "of which the task reads the first" in found.left_out[0]


@pytest.mark.parametrize(("task", "objective"), [(None, "causal"), (None, "masked"), (CLASSIFY, "causal")])
def test_weights_in_eight_bits_are_explained_without_attributions(written, tmp_path, task, objective):
    folder = written(task, objective=objective)
    export_int8(folder, tmp_path / "int8")
    small, large = open_model(tmp_path / "int8"), open_model(folder)
    with torch.no_grad():
        for weight in large.model.parameters():
            if weight.dim() == 2:
                whole, scale = rounded(weight)
                weight.copy_(whole * scale[:, None])
    found, expected = (explain(loaded, TEXT, points=0) for loaded in (small, large))
    assert [each.bits for each in found.predictions.values()] == pytest.approx(
        [each.bits for each in expected.predictions.values()], rel=1e-3
    )
    assert [label.label for label in found.labels] == [label.label for label in expected.labels]
    assert not any(each.carried for each in (*found.predictions.values(), *found.labels))
    np.testing.assert_allclose(found.attention, expected.attention, atol=1e-3)
    with pytest.raises(GptcoreError, match="weights in eight bits have no gradients: take --points 0, or the model that"):
        explain(small, TEXT)


def test_an_empty_text_is_a_clear_error(opened):
    for text in ("", " \n"):
        with pytest.raises(GptcoreError, match="the text is empty"):
            explain(opened(), text)


# ---------------------------------------------------------------------------------------------------- the page --

EVIL = '</script><script>document.title = "taken"</script><!--<script> <img src=x onerror=alert(1)> &lt; \u2028 \r\n 数'


class Elements(HTMLParser):
    """Tags of a page, and what stands in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.policy = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.policy = dict(attrs).get("content", "") if ("http-equiv", "Content-Security-Policy") in attrs else self.policy

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and data.strip():
            self.scripts.append(data)


def test_nothing_in_a_text_becomes_markup(opened):
    loaded = opened(context=256)
    found = explain(loaded, EVIL, points=2)
    page = explanation_page(found, loaded, "<b>&name")
    plain = Elements(explanation_page(explain(loaded, "harmless", points=2), loaded, "name"))
    evil = Elements(page)
    assert evil.tags == plain.tags
    assert evil.policy == plain.policy
    data = json.loads(evil.scripts[0])
    assert "".join(text for _, _, text in data["characters"][1:]) == EVIL
    assert data["name"] == "<b>&name"
    assert page == explanation_page(found, loaded, "<b>&name")


def test_the_page_asks_nobody_for_anything(opened):
    loaded = opened()
    page = explanation_page(explain(loaded, TEXT, points=0), loaded, "name")
    assert "default-src 'none'" in Elements(page).policy
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="draws the page in Chromium")
def test_a_browser_draws_the_page_and_runs_only_its_own_script(opened, tmp_path):
    loaded = opened(CLASSIFY)
    (tmp_path / "page.html").write_text(explanation_page(explain(loaded, EVIL), loaded, "name"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    told = subprocess.run(
        ["chromium", *flags.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
         "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/page.html"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in told.stderr
    assert "<title>name explained</title>" in told.stdout
    assert "What carried <span" in told.stdout
    assert told.stdout.count("<canvas") == 1 + 2 * 4
