"""Small data sets out of CIFAR-100, to choose defaults by: 5, 10 and 20 classes, unlike each other or alike.

`coarse` sets have superclasses as classes, which look unlike each other; `fine` sets have the classes of a few
superclasses, which look alike. Each is a folder with train.parquet and test.parquet: configs/bench/development.toml.

    python benchmarks/cifar100_sets.py CIFAR100 local

CIFAR100 is a folder with train.parquet and test.parquet, columns `image` and `label` with the 100 fine names.
"""

import argparse
from pathlib import Path

from datasets import ClassLabel, Dataset, load_dataset

# Of A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
COARSE = {  # superclasses, and training images of each of their five classes: 400, 200 and 100 a superclass
    "coarse5": (["fish", "flowers", "household_furniture", "large_natural_outdoor_scenes", "vehicles_1"], 80),
    "coarse10": (sorted(SUPERCLASSES)[::2], 40),
    "coarse20": (sorted(SUPERCLASSES), 20),
}
FINE = {  # superclasses; all training images of their classes: 100 a class
    "fine5": ["large_carnivores"],
    "fine10": ["vehicles_1", "vehicles_2"],
    "fine20": ["aquatic_mammals", "fish", "insects", "reptiles"],
}


def classes_of(name: str) -> dict[str, str]:
    """The class in the set of each fine class that it has."""
    superclasses = COARSE[name][0] if name in COARSE else FINE[name]
    return {
        fine: superclass if name in COARSE else fine
        for superclass in superclasses
        for fine in SUPERCLASSES[superclass].split()
    }


def subset(images: Dataset, name: str, most: int | None) -> Dataset:
    """The images of a set, at most `most` of each fine class (None: all), the first ones, with the set's labels."""
    fine_names = images.features["label"].names
    classes = classes_of(name)
    names = sorted(set(classes.values()))
    rows, labels, seen = [], [], dict.fromkeys(classes, 0)
    for row, label in enumerate(images["label"]):
        fine = fine_names[label]
        if fine in classes and (most is None or seen[fine] < most):
            seen[fine] += 1
            rows.append(row)
            labels.append(names.index(classes[fine]))
    chosen = images.select(rows).remove_columns("label")
    return chosen.add_column("label", labels).cast_column("label", ClassLabel(names=names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar100", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for split in ("train", "test"):
        images = load_dataset("parquet", data_files=str(options.cifar100 / f"{split}.parquet"), split="train")
        for name in (*COARSE, *FINE):
            most = COARSE[name][1] if name in COARSE and split == "train" else None
            folder = options.out / f"cifar100-{name}"
            folder.mkdir(parents=True, exist_ok=True)
            subset(images, name, most).to_parquet(str(folder / f"{split}.parquet"))
            print(f"{folder}: {split}")


if __name__ == "__main__":
    main()
