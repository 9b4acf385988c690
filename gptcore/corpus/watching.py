"""Whether there is new text, cheaply: of a file that was not touched nothing but its date is read."""

import json
from collections.abc import Mapping
from pathlib import Path

from gptcore.artifacts import digest_of, write_json
from gptcore.config import CorpusConfig, PipelineConfig
from gptcore.corpus.sources import identify
from gptcore.errors import SourceError


def source_digests(config: CorpusConfig, home: Path) -> dict[str, str]:
    """What every source holds right now, as a digest by its name. Raises `SourceError` for one that is missing."""
    return {source.name: digest_of(identify(source, home)) for source in config.sources}


def changed_sources(config: CorpusConfig, home: Path, seen: Mapping[str, str]) -> list[str]:
    """Names of the sources that are not what they were when `seen` (name -> digest) was taken."""
    return [name for name, digest in source_digests(config, home).items() if seen.get(name) != digest]


class Watch:
    """Looks at the sources of a pipeline every now and then and tells of each change once, when it has come to rest.

    What was told is remembered in `<home>/watch/<name>.json`, so that a change while nobody watched is told of too. The very
    first look only remembers.
    """

    def __init__(self, home: Path, config: PipelineConfig) -> None:
        self._home, self._config = home, config
        self._memory = home / "watch" / f"{config.name}.json"
        self._before: dict[str, str] | None = None

    def look(self) -> list[str]:
        """Names of the sources that changed since a change was last told of, and not since the last look; else none.

        A source that cannot be read right now, such as a folder that is being replaced, has not come to rest.
        """
        try:
            now = source_digests(self._config.corpus, self._home)
        except SourceError:
            self._before = None
            return []
        rests, self._before = now == self._before, now
        told = self._told()
        if told is None:
            self._remember(now)
            return []
        return [name for name, digest in now.items() if told.get(name) != digest] if rests else []

    def told(self) -> None:
        """The change that the last look returned was passed on."""
        if self._before is not None:
            self._remember(self._before)

    def _told(self) -> dict[str, str] | None:
        try:
            told: dict[str, str] = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return told

    def _remember(self, digests: Mapping[str, str]) -> None:
        self._memory.parent.mkdir(exist_ok=True)
        write_json(self._memory, digests)
