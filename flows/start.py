"""The order of things where a base begins with a finished one or is one, and which order it is that settings ask for."""

from collections.abc import Callable
from functools import cached_property

from flows.chain import Chain
from flows.lookup import model_folder
from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig
from gptcore.record import tokenizer_within
from gptcore.start import FinishedBase, read_base
from tasks.base import continue_base, import_base
from tasks.evaluation import evaluate
from tasks.registry import Registry
from tasks.run import PENDING, Run
from tasks.start import take_start


class Started(Chain):
    """The chain of a base that is trained on from a finished one, with the shape and the tokenizer of that."""

    def __init__(self, run: Run, config: PipelineConfig, finished: FinishedBase) -> None:
        super().__init__(run, finished.settings(config))
        self.finished = finished

    @cached_property
    def start(self) -> Artifact:
        """The finished base."""
        return take_start(self.run, self.name, self.finished)

    @cached_property
    def tokenizer(self) -> Artifact:
        """The one that it speaks, which lies in its own folder."""
        return Artifact("tokenizer", self.name, self.start.path, "", self.finished.tokenizer)

    @cached_property
    def base(self) -> Artifact:
        """The start, trained on."""
        model, training = self.config.model, self.config.training
        return continue_base(self.run, self.name, model, training, self.start, self.shards, self.tokenizer)

    def evaluation(self, what: str, model: Artifact) -> Artifact:
        """As in a chain; the base stands beside what it was."""
        if what != "base":
            return super().evaluation(what, model)
        return evaluate(self.run, self.name, self.config.evaluation, model, self.corpus, self.start)


class Upon(Chain):
    """The chain upon a base that is there: no tokenizer is learned and nothing pretrained."""

    def __init__(self, run: Run, config: PipelineConfig, base: Callable[[], Artifact]) -> None:
        super().__init__(run, config)
        self._base = base

    @cached_property
    def base(self) -> Artifact:
        """As it is."""
        return self._base()

    @cached_property
    def tokenizer(self) -> Artifact:
        """The one that the base speaks, which lies in its own folder."""
        base = self.base
        if base.digest == PENDING:
            return Artifact("tokenizer", self.name, base.path / "model", "", PENDING)
        return Artifact("tokenizer", self.name, base.path / "model", "", tokenizer_within(base.manifest()))


def open_chain(run: Run, config: PipelineConfig) -> Chain:
    """The chain that the settings ask for.

    Raises `ModelNotFoundError` for a start that is not there, `ModelFormatError` for a model that cannot be imported.
    """
    called, home = config.base.init_from, run.store.home
    if config.base.import_from is not None:
        from gptcore.model.importing import find_original  # loads torch

        original = find_original(config.base.import_from, home)
        return Upon(run, original.settings(config), lambda: import_base(run, config.name, original))
    if called is None:
        return Chain(run, config)
    folder = model_folder(called, home, lambda: Registry(home, run.watcher.say))
    return Started(run, config, read_base(called, folder, home))
