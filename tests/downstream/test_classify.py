import pytest
from sklearn.metrics import f1_score

from gptcore.config import PythonDocsSource, TaskConfig, TrainingConfig
from gptcore.corpus import Document
from gptcore.downstream.classify import accuracy, find_rows, frequent_labels, macro_f1, masking
from gptcore.downstream.row import Row


def docstring(text: str, module: str = "numpy.linalg.core") -> Document:
    return Document(f"{module}:f", text, "docs", module, {"package": module.split(".")[0]})


EXAMPLES = [
    docstring(">>> import numpy as np\n>>> np.zeros(3)"),
    docstring(">>> from sklearn import svm, datasets", "sklearn.svm.base"),
    docstring("Read a file.", "json.decoder"),
]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("A NumPy array, as numpy has it.", "A library array, as library has it."),
        (">>> import numpy as np", ">>> import library as library"),
        ("np.linalg.norm(x) and numpy.zeros(3)", "library.norm(x) and library.zeros(3)"),
        ("uses scikit-learn, scikit_learn or sklearn", "uses library, library or library"),
        ("from sklearn.svm import SVC", "from library import SVC"),
        ("svm.SVC() is an svm", "library.SVC() is an svm"),
        ("is_numpy, NumpyArray, __sklearn_tags__", "is_library, libraryArray, __library_tags__"),
        ("json.dumps writes JSON", "library.dumps writes JSON"),
        ("numpydoc and unnumpy are other words; so is np", "numpydoc and unnumpy are other words; so is np"),
        ("self.np.zeros", "self.np.zeros"),
    ],
)
def test_the_names_of_packages_are_replaced(text, masked):
    assert masking(["numpy", "sklearn", "stdlib"], EXAMPLES)(text) == masked


def test_the_names_of_other_packages_stay():
    assert masking(["sklearn"], EXAMPLES)("numpy, np.zeros and json.dumps") == "numpy, np.zeros and json.dumps"


def task(**changes) -> TaskConfig:
    source = PythonDocsSource(packages=("numpy", "sklearn", "stdlib"))
    return TaskConfig(type="classify", source=source, training=TrainingConfig(steps=1), **changes)


def test_a_docstring_is_labelled_with_its_package_and_every_name_is_masked_in_every_text():
    text = "Arrays of numpy go into sklearn. " * 4
    found = find_rows([docstring(text), docstring(text, "sklearn.svm"), docstring("Too short.")], task())
    masked = ("Arrays of library go into library. " * 4).strip()
    assert [(row.input, row.target) for row in found.rows] == [(masked, "numpy"), (masked, "sklearn")]
    assert [item.reason for item in found.aside] == ["too_short_to_tell"]
    assert find_rows([docstring(text)], task(mask_names=False)).rows[0].input == text.strip()


def test_rare_labels_are_those_below_the_share():
    rows = [Row("", label, docstring("")) for label in ["a"] * 98 + ["b"] + ["c"]]
    assert frequent_labels(rows, 0.01) == {"a", "b", "c"}
    assert frequent_labels(rows, 0.011) == {"a"}


def test_accuracy_and_macro_f1_are_those_of_a_worked_example():
    outputs, targets = ["a", "a", "b", "b", "a"], ["a", "b", "b", "c", "a"]
    assert accuracy(outputs, targets).tolist() == [1, 0, 1, 0, 1]
    # a: 2 hits, 3 given, 2 true; b: 1 hit, 2 given, 2 true; c: never given.
    assert macro_f1(outputs, targets, ["a", "b", "c"]) == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert macro_f1(outputs, targets, ["a", "b", "c"]) == pytest.approx(f1_score(targets, outputs, average="macro"))
