"""One door for all settings: YAML and --set in, one frozen PipelineConfig out, or one message with every problem."""

import pytest
from pydantic import ValidationError

from gptcore.config import (
    PRESETS,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainingConfig,
    load_config,
    parse_config,
    preset,
)
from gptcore.errors import SettingsError
from gptcore.start import with_shape

SMALL = """
name: tiny
corpus:
  sources: [{type: files, paths: [texts]}]
training: {minutes: 3}
"""


@pytest.fixture
def config(tmp_path):
    """A function that loads the small settings with overrides, and with more YAML at the end."""

    def load(*overrides: str, more: str = "", texts: tuple[str, ...] = ()) -> PipelineConfig:
        path = tmp_path / "small.yaml"
        path.write_text(SMALL + more)
        return load_config(path, overrides, texts)

    return load


def problems(call, *arguments, **named) -> str:
    with pytest.raises(SettingsError) as told:
        call(*arguments, **named)
    return str(told.value)


def test_settings_never_change_after_loading(config):
    with pytest.raises(ValidationError):
        config().model.width = 5


def test_a_number_with_an_exponent_is_a_number_although_yaml_reads_it_as_text(config):
    assert config("training.optimizer.rate=1e-3").training.optimizer.rate == 0.001
    assert config(more="model: {norm_epsilon: 1e-5}\n").model.norm_epsilon == 1e-5


@pytest.mark.parametrize(("word", "meant"), [("on", True), ("off", False), ("true", True), ("auto", "auto")])
def test_on_and_off_mean_what_yaml_makes_of_them(config, word, meant):
    assert config(f"training.compile={word}").training.compile == meant


@pytest.mark.parametrize("settings", [["processes=17"], ["processes=3"], ["nodes=2", "processes=3"], ["nodes=32"]])
def test_every_trainer_process_has_as_many_rows_or_it_is_said_before_any_work(config, settings):
    text = problems(config, *(f"training.{setting}" for setting in settings))
    assert "process(es) each do not divide batch (8): change one of them, so that every process has as many rows" in text


def test_every_problem_is_named_at_once(config):
    text = problems(config, "training.stepps=3", "model.heads=5", "split.valid=2", "nonsense=1")
    assert "4 problem(s)" in text
    for part in (
        "training.stepps: unknown setting; did you mean steps?",
        "heads (5) do not divide width (384)",
        "split.valid: ",
        "nonsense: unknown setting",
    ):
        assert part in text


def test_one_budget_takes_the_place_of_another(config):
    training = config("training.steps=40").training
    assert (training.minutes, training.steps, training.tokens) == (None, 40, None)
    assert "exactly one of minutes, steps and tokens" in problems(config, "training.minutes=null")


def test_an_override_reaches_into_lists_and_new_sections(config):
    loaded = config("corpus.sources.0.text=body", "tokenizer.vocabulary=500")
    assert loaded.corpus.sources[0].text == "body"
    assert loaded.tokenizer.vocabulary == 500
    assert "there are 1 items" in problems(config, "corpus.sources.3.text=body")
    assert "expected section.key=value" in problems(config, "training")
    assert "inside a value that has no parts" in problems(config, "name.first.second=x")


def test_text_of_ones_own_makes_a_model_with_its_own_name_and_no_tasks(config, tmp_path):
    loaded = config(texts=(str(tmp_path / "Meine Texte.tar"),), more="evaluation: {prompts: [Return], samples: 3}\n")
    assert loaded.name == "meine-texte-gpt"
    assert loaded.corpus.sources[0].paths == (str(tmp_path / "Meine Texte.tar"),)
    assert loaded.tasks == ()
    assert loaded.evaluation.samples == 3
    assert "--text is empty" in problems(config, texts=("",))
    assert config("name=docs-gpt", texts=("docs",)).name == "docs-gpt", "said by hand"


def test_a_password_in_a_url_is_refused_without_repeating_it(config):
    text = problems(config, "corpus.sources.0.paths=[https://me:geheim@example.org/x.txt]")
    assert "put credentials into the environment" in text
    assert "user or password" in problems(config, "corpus.sources.0.paths=[https://token@example.org/x.txt]")
    assert "geheim" not in text


def test_a_preset_is_a_beginning(config):
    model = config(more="model: {preset: gpt2, context: 64}\n").model
    assert (model.layers, model.norm, model.context) == (12, "layer", 64)
    assert "there are: transformer, gpt1" in problems(preset, "gpt9")
    assert all(preset(name).size_of_head for name in PRESETS)


def test_what_is_no_yaml_or_no_settings_is_said(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    assert "is not valid YAML" in problems(load_config, path)
    path.write_text("name: a\nname: b\n")
    assert "the key 'name' stands twice" in problems(load_config, path)
    path.write_bytes(b"name: \xff")
    assert "are not UTF-8 text" in problems(load_config, path)
    path.write_text("corpus: 5\nevaluation: [1]\ntraining: {steps: 1}")
    assert "2 problem(s)" in problems(load_config, path, texts=["docs"])
    path.write_text("just words")
    assert "holds no settings" in problems(load_config, path)
    assert "cannot read the settings" in problems(load_config, tmp_path / "none.yaml")


def test_what_was_dumped_loads_as_the_same_settings(config):
    loaded = config(
        "training.compile=off",
        more="tasks: [{type: summarize, source: {type: files, paths: [t], target: s}, training: {steps: 5}}]\n",
    )
    assert parse_config(loaded.model_dump(mode="json")) == loaded


def test_a_setting_that_came_later_leaves_no_trace_while_it_is_unset():
    """What enters a fingerprint is what is written out."""
    written = ModelConfig().model_dump(mode="json")
    later = ModelConfig.model_fields.keys() - written.keys()
    assert later == {"ffn_biases", "rope_scaling"}
    assert ModelConfig(**written, ffn_biases=True).model_dump(mode="json") == {**written, "ffn_biases": True}


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ("{rope_type: llama3, factor: 8}", "llama3 needs low_freq_factor, high_freq_factor, original_max_position_embeddings"),
        ("{rope_type: linear, factor: 8, low_freq_factor: 1}", "of type linear knows no low_freq_factor"),
        ("{rope_type: yarn, factor: 8}", "model.rope_scaling.rope_type"),
    ],
)
def test_stretched_positions_name_all_that_their_type_needs(config, scaling, problem):
    assert problem in problems(config, f"model.rope_scaling={scaling}")


def test_a_shape_that_is_there_and_one_that_is_asked_for_differ_in_later_settings_too(config):
    plain, biased = ModelConfig(layers=2), ModelConfig(layers=2, ffn_biases=True)
    asking = config("model.layers=2", "model.ffn_biases=true")
    assert "ask for model.ffn_biases True, not None:" in problems(with_shape, asking, "a base", plain, 4096)
    assert "ask for model.ffn_biases None, not True:" in problems(with_shape, config("model.layers=2"), "a base", biased, 4096)
    assert with_shape(config(), "a base", biased, 4096).model == with_shape(asking, "a base", biased, 4096).model == biased


def test_a_rate_that_is_not_set_suits_the_algorithm_and_the_width():
    muon, adamw = OptimizerConfig(), OptimizerConfig(algorithm="adamw")
    assert muon.suited(256).rate == pytest.approx(2 * muon.suited(1024).rate)
    assert adamw.suited(256).rate == pytest.approx(4 * adamw.suited(1024).rate)
    assert muon.suited(256, 0.1).rate == pytest.approx(0.1 * muon.suited(256).rate)
    set_by_hand = OptimizerConfig(rate=0.003)
    assert set_by_hand.suited(1024, 0.1) == set_by_hand
    assert TrainingConfig(steps=1).suited(256).optimizer == muon.suited(256)


def test_a_round_is_trained_as_the_base_was_but_gently_and_with_a_budget_of_its_own(config):
    settings = config("continual.rate=0.1", "training.optimizer.rate=0.02")
    training = settings.continual.training(settings.training, 5000)
    assert (training.tokens, training.steps, training.minutes) == (10_000, None, None)
    assert (training.optimizer.rate, training.optimizer.matrix_rate) == pytest.approx((0.002, 0.001))
    assert training.batch == settings.training.batch
    settings = config("continual.steps=30", "continual.minutes=2")
    training = settings.continual.training(settings.training.suited(256), 5000)
    assert (training.tokens, training.steps, training.minutes) == (None, None, 2)
    assert "replay" in problems(config, "continual.replay=1.0")


def test_a_context_longer_than_a_shard_is_refused_at_the_door(config):
    text = problems(config, "shards.tokens_per_shard=255")
    assert "model.context (256) is longer than shards.tokens_per_shard (255); lower one or raise the other" in text
    assert config("shards.tokens_per_shard=256").shards.tokens_per_shard == 256


def test_an_unknown_objective_is_told_with_those_there_are(config):
    told = problems(config, "model.objective=masked_lm")
    assert "model.objective" in told
    assert "'causal', 'masked' or 'prefix'" in told
    assert "masked_lm" in told


def test_a_masked_model_has_no_tasks_and_a_prefix_model_room_for_its_span(config):
    task = "tasks: [{type: classify, source: {type: files, paths: [rows.csv], target: label}, training: {steps: 5}}]"
    assert "which a masked model cannot do" in problems(config, "model.objective=masked", more=task)
    assert config("model.objective=prefix", more=task).model.row_context == 254
    assert "a context of 8 or more" in problems(config, "model.objective=prefix", "model.context=4")


def test_a_mixture_names_every_source_of_the_corpus_and_nothing_else(config):
    sources = "corpus.sources=[{type: files, name: books, paths: [b]}, {type: files, name: web, paths: [w]}]"
    assert config(sources, "training.mixture={books: 3, web: 0}").training.mixture == {"books": 3.0, "web": 0.0}
    for mixture, named in (("{books: 1}", "books"), ("{books: 1, web: 1, wep: 0}", "books, web, wep")):
        told = problems(config, sources, f"training.mixture={mixture}")
        assert f"names {named}, the sources of the corpus are books, web" in told
    assert "leaves every source out" in problems(config, sources, "training.mixture={books: 0, web: 0}")
    assert "training.mixture.web: " in problems(config, sources, "training.mixture={books: 1, web: -1}")
    task = "tasks: [{type: summarize, source: {type: files, paths: [t], target: s}, training: {steps: 5, mixture: {t: 1}}}]\n"
    assert "training.mixture is for the base" in problems(config, more=task)


def test_a_mixture_is_left_behind_by_a_round_and_by_other_text(config, tmp_path):
    settings = config("training.mixture={files: 1}")
    assert settings.continual.training(settings.training.suited(256), 5000).mixture is None
    path = tmp_path / "mixed.yaml"
    path.write_text(SMALL.replace("minutes: 3", "minutes: 3, mixture: {files: 1}"))
    assert load_config(path).training.mixture == {"files": 1.0}
    assert load_config(path, texts=["docs"]).training.mixture is None


def test_what_is_written_out_is_what_the_schema_asks_for(config):
    """Prefect checks the one against the other."""
    loaded = config(more="base: {import: gpt2}\n")
    assert loaded.base.import_from == "gpt2"
    assert parse_config(loaded.model_dump(mode="json")) == loaded
    definitions = PipelineConfig.model_json_schema()["$defs"]
    assert loaded.base.model_dump().keys() == definitions["BaseConfig"]["properties"].keys()
