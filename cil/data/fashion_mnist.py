"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747): articles of clothing, 1 x 28 x 28."""

from torchvision.datasets import FashionMNIST

from cil.data.base import DataSet, DataSource, ImageSet, MissingData, data_sets

# Of the training images, as `cil.data.base.colour_statistics` gives them, to four places.
_MEAN, _STD = (0.2860,), (0.3530,)


@data_sets.register("fashion_mnist")
class FashionMnist(DataSource):
    """60 000 training and 10 000 test images of 10 classes, from torchvision's files in the root.

    Args:
        root: Folder of all data sets.
        download: Fetch the files into `root` if they are not there.
    """

    def check(self) -> None:
        """The files must be there, or be allowed to be fetched.

        Raises:
            MissingData: If they are not.
        """
        folder = self.root / "FashionMNIST" / "raw"
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
        try:
            parts = [FashionMNIST(self.root, train=train, download=self.download) for train in (True, False)]
        except (RuntimeError, OSError, ValueError, AssertionError) as error:  # missing, damaged or unreachable
            raise MissingData(
                f"the files of fashion_mnist in {self.root.absolute()} cannot be "
                f"{'fetched' if self.download else 'used; add data.download=true to fetch them anew'}: {error}"
            ) from error
        train, test = (ImageSet(part.data[:, None].contiguous(), part.targets.long()) for part in parts)
        return DataSet("fashion_mnist", train, test, tuple(parts[0].classes), _MEAN, _STD)
