"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747): articles of clothing, 1 x 28 x 28."""

from torchvision.datasets import FashionMNIST

from cil.data.base import DataSet, DataSource, ImageSet, MissingData, data_sets
from cil.data.fetch import open_or_fetch

# Of the training images, as `cil.data.base.colour_statistics` gives them, to four places.
_MEAN, _STD = (0.2860,), (0.3530,)

_FOLDER = "FashionMNIST/raw"
#: Of the files at torchvision's first mirror, each with `.gz` behind its name.
_SHA256 = {
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


@data_sets.register("fashion_mnist")
class FashionMnist(DataSource):
    """60 000 training and 10 000 test images of 10 classes, from torchvision's files in the root.

    Args:
        root: Folder of all data sets.
        download: Fetch the files into `root` if they are not there, or damaged.
    """

    def check(self) -> None:
        """The files must be there, or be allowed to be fetched.

        Raises:
            MissingData: If they are not.
        """
        folder = self.root / _FOLDER
        if not (self.download or folder.is_dir()):
            raise MissingData(
                f"fashion_mnist is not there: looked for {folder.absolute()}. To fetch it (about 30 MB), add "
                "data.download=true to the command; if it is elsewhere, set data.root"
            )

    def load(self) -> DataSet:
        """Read torchvision's files, fetching them first if that is allowed.

        Raises:
            MissingData: If they are not there, damaged, or cannot be fetched.
        """
        self.check()
        parts = open_or_fetch(
            "fashion_mnist",
            lambda train: FashionMNIST(self.root, train=train),
            {f"{FashionMNIST.mirrors[0]}{file}.gz": sha256 for file, sha256 in _SHA256.items()},
            self.root,
            _FOLDER,
            download=self.download,
        )
        train, test = (ImageSet(part.data[:, None].contiguous(), part.targets.long()) for part in parts)
        return DataSet("fashion_mnist", train, test, tuple(parts[0].classes), _MEAN, _STD)
