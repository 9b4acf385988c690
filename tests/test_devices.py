"""House rule: no tensor is made without saying on which device."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "gptcore"
MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}


def makers_without_device(source: str) -> list[int]:
    """Line numbers of `torch.zeros(...)` and the like that name no device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in MAKERS
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]


def test_the_rule_sees_what_it_forbids():
    assert makers_without_device("torch.zeros(3)\ntorch.zeros(3, device=x)\nnumpy.zeros(3)\nx.new_zeros(3)") == [1]


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_names_its_device(file):
    assert makers_without_device(file.read_text(encoding="utf-8")) == []
