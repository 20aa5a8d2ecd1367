from cil.data.augment import Augmentation, augmentations
from cil.data.base import DataSet, DataSource, Images, ImageSet, MissingData, data_sets
from cil.data.order import epoch_plan
from cil.data.split import validation_split
from cil.data.transform import Transform

__all__ = [
    "Augmentation",
    "DataSet",
    "DataSource",
    "ImageSet",
    "Images",
    "MissingData",
    "Transform",
    "augmentations",
    "data_sets",
    "epoch_plan",
    "validation_split",
]
