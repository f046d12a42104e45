"""The sets of CIFAR-100's classes that defaults are chosen by."""

import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # no package: it is where the script runs

from cifar100_sets import COARSE, FINE, SUPERCLASSES, classes_of, subset


def test_each_of_the_hundred_classes_has_one_superclass() -> None:
    fine = [name for names in SUPERCLASSES.values() for name in names.split()]
    assert len(SUPERCLASSES) == 20
    assert len(set(fine)) == len(fine) == 100


def test_a_set_has_as_many_classes_as_its_name_says() -> None:
    for name in (*COARSE, *FINE):
        assert f"{len(set(classes_of(name).values()))}" == name.removeprefix("coarse").removeprefix("fine")


def test_images_keep_their_class_and_at_most_so_many_are_taken() -> None:
    names = ["bear", "beaver", "rose", "trout", "ray"]
    features = Features({"image": Value("int64"), "label": ClassLabel(names=names)})
    images = Dataset.from_dict({"image": list(range(10)), "label": [0, 1, 2, 3, 4] * 2}, features=features)
    whole = subset(images, "fine20", None)  # no bear and no rose
    assert [(row["image"], whole.features["label"].names[row["label"]]) for row in whole] == [
        (1, "beaver"), (3, "trout"), (4, "ray"), (6, "beaver"), (8, "trout"), (9, "ray")
    ]  # fmt: skip
    few = subset(images, "coarse5", 1)
    assert [(row["image"], few.features["label"].names[row["label"]]) for row in few] == [
        (2, "flowers"), (3, "fish"), (4, "fish")
    ]  # fmt: skip
