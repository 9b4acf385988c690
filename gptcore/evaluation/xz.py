"""`xz -9` primed with the training text: how well a compressor that has read it all predicts the test text.

The extra bytes that the test text costs are the size of xz(train + test) minus the size of xz(train). Each of these
takes seconds for ten megabytes, and there is one more per source. So a process of its own compresses the training text
once and then forks: every copy finishes with another ending. The sizes are exactly those of separate runs.

This file imports the standard library only and also runs as that process.
"""

import json
import lzma
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

# The dictionary of preset 9: text further back than this cannot help, so it is not compressed.
WINDOW = 64 * 2**20
_PIECE = 2**16
_BETWEEN_DOCUMENTS = "\0"


def xz_bits_per_byte(train: Sequence[str], tests: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Bits per UTF-8 byte of each set of test documents, given all training documents.

    Documents are separated by one zero byte, which costs xz a fraction of a bit and is not counted in the bytes.
    """
    # The child cuts to bytes; so many characters are at least as many bytes.
    task = {"train": _joined(train)[-WINDOW:], "tests": {name: _joined(texts) for name, texts in tests.items()}}
    # -I: neither the environment nor this folder's modules can stand in the way of the standard library.
    command = [sys.executable, "-I", __file__]
    result = subprocess.run(command, input=json.dumps(task).encode(), capture_output=True, check=True)
    extra: dict[str, int] = json.loads(result.stdout)
    return {name: 8 * extra[name] / sum(len(text.encode()) for text in tests[name]) for name in tests}


def extra_bytes(train: bytes, tests: Mapping[str, bytes]) -> dict[str, int]:
    """Bytes by which `xz -9` of train + test is longer than that of train alone. Forks: one thread only."""
    compressor = primed(train)
    alone = _finished_in_a_copy(compressor, b"")
    return {name: _finished_in_a_copy(compressor, test) - alone for name, test in tests.items()}


def primed(train: bytes) -> lzma.LZMACompressor:
    """A compressor that has worked through the training text."""
    compressor, known = lzma.LZMACompressor(preset=9), train[-WINDOW:]
    # Given all at once, the text would only be stored, and every copy would have to work through it.
    for start in range(0, len(known), _PIECE):
        compressor.compress(known[start : start + _PIECE])
    return compressor


def _finished_in_a_copy(compressor: lzma.LZMACompressor, ending: bytes) -> int:
    """Bytes that are still to come when the stream ends so; the compressor itself stays as it is."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        size = len(compressor.compress(ending)) + len(compressor.flush())
        os.write(writer, str(size).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        size = int(answer.read())
    os.waitpid(child, 0)
    return size


def _joined(documents: Sequence[str]) -> str:
    """Documents, each followed by the separator, so that train + test is the same as their documents joined."""
    return "".join(document + _BETWEEN_DOCUMENTS for document in documents)


def _main() -> None:
    task = json.load(sys.stdin.buffer)
    tests = {name: text.encode() for name, text in task["tests"].items()}
    json.dump(extra_bytes(task["train"].encode(), tests), sys.stdout)


if __name__ == "__main__":
    _main()
