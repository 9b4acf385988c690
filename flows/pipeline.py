"""From raw text to promoted models: the whole chain."""

from prefect import flow

from flows.session import open_run
from gptcore.config import PipelineConfig
from tasks.base import train_base
from tasks.corpus import prepare_corpus, prepare_examples
from tasks.evaluation import evaluate
from tasks.finetune import finetune
from tasks.promotion import Outcome, promote, write_results
from tasks.run import Run
from tasks.shards import encode_corpus, encode_examples
from tasks.tokenizer import learn_tokenizer


@flow(name="pipeline")
def pipeline(config: PipelineConfig) -> Outcome:
    """Build or reuse every stage, then register and promote what is better."""
    with open_run(config) as run:
        return chain(run, config)


def chain(run: Run, config: PipelineConfig) -> Outcome:
    """The order of things; with a planning run nothing is built."""
    name = config.name
    examples = {task.name: prepare_examples(run, name, task, config.split, config.corpus.workers) for task in config.tasks}
    corpus = prepare_corpus(run, name, config.corpus, config.split, examples)
    tokenizer = learn_tokenizer(run, name, config.tokenizer, corpus)
    shards = encode_corpus(run, name, config.shards, corpus, tokenizer)
    models = {"base": train_base(run, name, config.model, config.training, shards, tokenizer)}
    tests = {"base": corpus, **examples}
    for task in config.tasks:
        rows = encode_examples(run, name, task, config.model, examples[task.name], tokenizer)
        models[task.name] = finetune(run, name, task, config.model, models["base"], examples[task.name], rows)
    evaluations = {what: evaluate(run, name, config.evaluation, model, tests[what]) for what, model in models.items()}
    promotions = [promote(run, config.evaluation, models[what], evaluations[what], tests[what]) for what in models]
    return write_results(run, name, evaluations, promotions)
