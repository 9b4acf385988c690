"""The mistakes a user can make. Every one ends in a single sentence that says what, where and what to do.

    GptcoreError                     exit code 1, one message, no traceback
    ├── SettingsError                a setting that is unknown, of the wrong type or does not fit another one
    ├── SourceError                  a source that is missing, unreadable or holds nothing usable
    ├── CorpusError                  too little text to split, or too little for one context
    ├── TokenizerError               a vocabulary that the text does not allow, a tokenizer that does not fit
    ├── ArtifactError                an artifact that is not there or cannot be read
    │   └── CorruptArtifactError     an artifact whose files are not the ones that were published
    ├── ModelFormatError             a model of another format that cannot be imported, or one of ours that it cannot hold
    ├── DiskFullError                no space left; what was there before is untouched
    ├── TrainingError                the trainer could not start or did not finish; its checkpoints are kept
    │   ├── TrainerDied              the trainer was killed or ran out of memory; trying again may help
    │   └── Interrupted              the trainer was asked to stop and saved (exit code 130)
    ├── ModelNotFoundError           a name, alias, version or path that leads to no model
    └── RegistryError                the registry cannot be reached or refuses a change

Our own mistakes are `assert`s and tracebacks; they never derive from GptcoreError.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class GptcoreError(Exception):
    """A mistake a user can mend. `str(error)` says what, where and what to do."""

    exit_code = 1


class SettingsError(GptcoreError):
    """A setting that is unknown, of the wrong type or does not fit another one."""


class SourceError(GptcoreError):
    """A source that is missing, unreadable or holds nothing usable."""


class CorpusError(GptcoreError):
    """Too little text to split, or too little for one context."""


class TokenizerError(GptcoreError):
    """A vocabulary that the text does not allow, or a tokenizer that does not fit."""


class ArtifactError(GptcoreError):
    """An artifact that is not there or cannot be read."""


class CorruptArtifactError(ArtifactError):
    """An artifact whose files are not the ones that were published."""


class ModelFormatError(GptcoreError):
    """A model of another format that cannot be imported, or one of ours that the other format cannot hold."""


class DiskFullError(GptcoreError):
    """No space left on the device; what was there before is untouched."""


class TrainingError(GptcoreError):
    """The trainer could not start or did not finish; its checkpoints are kept."""


class TrainerDied(TrainingError):
    """The trainer was killed by a signal that nobody asks with, or ran out of memory, which the next one needs less of."""


class Interrupted(TrainingError):
    """The trainer was asked to stop and saved its state."""

    exit_code = 130


class ModelNotFoundError(GptcoreError):
    """A name, alias, version or path that leads to no model."""


class RegistryError(GptcoreError):
    """The registry cannot be reached or refuses a change."""


# EFBIG is what a process with a file-size limit sees, EDQUOT one with a quota: to a user all three are a full disk.
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or an error it was raised from, says that no space is left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFullError) or (isinstance(seen, OSError) and seen.errno in _NO_SPACE):
            return True
        # Libraries written in C++ and Rust (safetensors, pyarrow, sentencepiece) carry the errno as text only.
        if "No space left on device" in str(seen) or "File too large" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def disk_full_is_clear(folder: Path) -> Iterator[None]:
    """Turn any "no space left" raised inside the block into one `DiskFullError` that names `folder`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(folder) from error
        raise


def disk_full(folder: Path) -> DiskFullError:
    """The one sentence about a disk on which `folder` has no room left."""
    return DiskFullError(
        f"no space left while writing to {folder}: free some space or set GPTCORE_HOME to a larger disk, "
        "then run again (finished stages and the last checkpoint are kept)"
    )
