"""CIFAR-100 (Krizhevsky 2009): photographs of 32 x 32 pixels, by their fine classes."""

from __future__ import annotations

from rgft.tasks.hub import HubTask

_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR = (
    HubTask(
        name="cifar100",
        description="what a small photograph shows, 100 classes (CIFAR-100, Krizhevsky 2009)",
        path="uoft-cs/cifar100",
        config="cifar100",
        folders=("cifar100",),
        input_columns=("img",),
        label_column="fine_label",
        label_names=tuple(_NAMES.split()),
        modality="image",
    ),
)
