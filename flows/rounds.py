"""The order of things in a round of continual training: the chain, with a champion in place of what is made from nothing."""

from functools import cached_property

from flows.chain import Chain
from flows.session import plan_run
from flows.start import Started, Upon
from gptcore.artifacts import Artifact, load_artifact
from gptcore.config import PipelineConfig, TrainingConfig
from gptcore.errors import ArtifactError
from gptcore.evaluation.forgetting import read_forgetting
from gptcore.record import BASE, OLD, START, Record
from gptcore.start import read_base
from tasks.base import continue_base
from tasks.continual import (
    CAUGHT_UP,
    KEPT,
    PROMOTED,
    UNCHANGED,
    WAITING,
    Champion,
    Continued,
    Parent,
    compare_rounds,
    find_champion,
    judged_before,
    nothing_done,
    promote_candidate,
    tasks_behind,
)
from tasks.corpus import prepare_new, unite
from tasks.evaluation import evaluate
from tasks.progress import show_results
from tasks.promotion import Promotion, promote, write_results
from tasks.registry import CHAMPION
from tasks.run import PENDING, Run
from tasks.shards import encode_new


class Settled(Chain):
    """The chain of a champion: all that it was made of is there; models of its tasks may not be."""

    def __init__(self, run: Run, config: PipelineConfig, champion: Champion) -> None:
        super().__init__(run, champion.settings(config))
        self.champion = champion

    @cached_property
    def corpus(self) -> Artifact:
        """All that it has seen."""
        return self.champion.corpus

    @cached_property
    def tokenizer(self) -> Artifact:
        """The one that it speaks."""
        return self.champion.tokenizer

    @cached_property
    def base(self) -> Artifact:
        """The champion itself."""
        return self.champion.base

    def promote_tasks(self) -> list[Promotion | None]:
        """Fine-tune every task from it; each model goes through the gate of its own test set."""
        config = self.config
        return [
            promote(self.run, config.evaluation, self.models[name], self.evaluations[name], self.examples[name], config.cost)
            for name in (task.name for task in config.tasks)
        ]


class Onward(Chain):
    """The chain of what a base becomes with new text and a share of the old beside it; `config.training` is all it needs."""

    def __init__(self, run: Run, config: PipelineConfig, parent: Parent) -> None:
        super().__init__(run, config)
        self.parent = parent

    @cached_property
    def new(self) -> Artifact:
        """What the sources hold and the parent has not seen."""
        return prepare_new(self.run, self.name, self.config.corpus, self.config.split, self.examples, self.parent.corpus)

    @cached_property
    def corpus(self) -> Artifact:
        """Old text and new."""
        return unite(self.run, self.name, self.parent.corpus, self.new)

    @cached_property
    def tokenizer(self) -> Artifact:
        """The one that the parent speaks."""
        return self.parent.tokenizer

    @cached_property
    def shards(self) -> Artifact:
        """What the new base reads."""
        config = self.config
        return encode_new(self.run, self.name, config.shards, config.continual, self.new, self.corpus, self.tokenizer)

    @cached_property
    def base(self) -> Artifact:
        """The parent, trained on."""
        model, training = self.config.model, self.training
        return continue_base(self.run, self.name, model, training, self.parent.base, self.shards, self.tokenizer)

    @property
    def training(self) -> TrainingConfig:
        """As its record says."""
        return self.config.training

    def noun(self, stage: str) -> Artifact:
        """As in a chain; three nouns are called otherwise in a round."""
        return super().noun({"corpus-new": "new", "corpus-all": "corpus", "shards-new": "shards"}.get(stage, stage))


class Round(Onward):
    """The chain of a candidate: the champion to begin with, and a gate at the end."""

    def __init__(self, run: Run, config: PipelineConfig, champion: Champion) -> None:
        super().__init__(run, champion.settings(config), champion)
        self.champion = champion

    @property
    def training(self) -> TrainingConfig:
        """As long as there is new text for."""
        config = self.config
        training = config.training.suited(config.model.width)
        return config.continual.training(training, int(self.shards.numbers.get("train_tokens", 0)))

    @cached_property
    def judgement(self) -> Artifact:
        """The candidate on old and new test documents."""
        return evaluate(self.run, self.name, self.config.evaluation, self.base, self.corpus)

    @cached_property
    def forgetting(self) -> Artifact:
        """The candidate beside the champion."""
        config, champion = self.config.evaluation, self.champion.version
        return compare_rounds(self.run, self.name, config, champion, self.judgement, self.corpus, self.new)

    @property
    def lacks(self) -> str:
        """Why there is too little new text for a round, as a sentence; empty if there is enough."""
        minimum, numbers = self.config.split.minimum, self.new.numbers
        have = {name: int(numbers[f"{name}_documents"]) for name in ("train", "test")}
        if min(have.values()) >= minimum:
            return ""
        if not max(have.values()):
            return f"no text is new since version {self.champion.version.version} was made"
        return (
            f"{have['train']} train and {have['test']} test documents are new since version {self.champion.version.version} "
            f"was made, a round needs {minimum} of each (split.minimum); they wait for more"
        )

    def promote_candidate(self) -> Promotion:
        """The gate."""
        champion = self.champion.version
        return promote_candidate(self.run, self.config, self.base, self.judgement, self.corpus, champion, self.forgetting)


def chain_of(record: Record, run: Run, config: PipelineConfig) -> Chain:
    """The chain that makes what a record is of: a round, where it went on from an earlier base. Raises `ArtifactError`."""
    if not record.given:
        return Chain(run, config)
    if START in record.given:
        return Started(run, config, read_base(START, record.given[START], run.store.home))
    if BASE in record.given and OLD not in record.given:  # it was imported
        return Upon(run, config, lambda: load_artifact(record.given[BASE]))
    if BASE not in record.given:
        raise ArtifactError(
            f"{record.target} belongs to a round of continual training and is rebuilt with the base that was trained on it: "
            f"give that model, for example {record.name}@champion"
        )
    base, corpus = (load_artifact(record.given[name]) for name in (BASE, OLD))
    return Onward(run, config, Parent(base, corpus))


def standing(config: PipelineConfig, champion: Champion) -> Continued | None:
    """How a round ends that has nothing to do, found without building anything or telling MLflow; None if it has."""
    planned = Round(plan_run(), config, champion)
    home, version = planned.run.store.home, champion.version
    if tasks_behind(home, planned.config, champion):
        return None
    if champion.has_seen(config, home):
        return nothing_done(UNCHANGED, f"nothing changed since version {version.version} was made", [version])
    if planned.new.digest == PENDING:
        return None
    if planned.lacks:
        return nothing_done(WAITING, planned.lacks, [version])
    judged = judged_before(home, planned.base) if planned.forgetting.digest != PENDING else None
    if judged is None:
        return None
    said = f"nothing changed since version {judged.version} was judged: {judged.evidence['verdict']}"
    return nothing_done(UNCHANGED, said, [version, judged])


def close(run: Run, config: PipelineConfig, champion: Champion) -> Continued:
    """Make the candidate and judge it; fine-tune the tasks from whoever is champion then."""
    if tasks_behind(run.store.home, champion.settings(config), champion):  # a run was killed before it made them
        return _close_tasks(run, config, champion)
    this = Round(run, config, champion)
    if this.lacks:
        return nothing_done(WAITING, this.lacks, [champion.version])
    promotion = this.promote_candidate()
    promoted = CHAMPION in promotion.version.aliases
    promotions: list[Promotion | None] = [promotion]
    evaluations = {"base": this.judgement}
    if promoted and this.config.tasks and config.continual.tasks:
        now = find_champion(run.store, config)
        assert now is not None, "it was promoted a moment ago"
        settled = Settled(run, config, now)
        promotions += settled.promote_tasks()
        evaluations = settled.evaluations
    outcome = write_results(run, config.name, evaluations, promotions)
    table, _, _ = read_forgetting(this.forgetting.path)
    _show(run, config.name, this.forgetting)
    state = PROMOTED if promoted else KEPT
    return Continued(state, f"version {promotion.version.version}: {promotion.verdict}", outcome, table)


def _close_tasks(run: Run, config: PipelineConfig, champion: Champion) -> Continued:
    settled = Settled(run, config, champion)
    promotions = settled.promote_tasks()
    outcome = write_results(run, config.name, settled.evaluations, promotions)
    said = (
        f"the tasks were behind and are fine-tuned from version {champion.version.version} now; new text is for the next round"
    )
    return Continued(CAUGHT_UP, said, outcome)


def _show(run: Run, name: str, forgetting: Artifact) -> None:
    """The forgetting table beside the results page, in Prefect, and with the results in MLflow."""
    assert run.results is not None, "results were written"
    for file in (forgetting.path / "report").glob("forgetting.*"):
        (run.results / file.name).write_bytes(file.read_bytes())
    show_results(run.results / "forgetting.md", f"{name}-forgetting", run.watcher.say)
