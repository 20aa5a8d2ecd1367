"""Images that stay in their files and are decoded when they are needed, by worker processes."""

import multiprocessing
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cil.data.base import Images, Plan
from cil.data.framing import NUM_DRAWS, Framing
from cil.seeding import SampleNoise

MAX_WORKERS = 8  # by default

#: Sample ids, views and key of a batch, as plain values: tensors would travel to the workers through shared memory.
Request = tuple[list[int], list[int], int | None]


def default_num_workers() -> int:
    """One worker for each core that this process may use, at most `MAX_WORKERS`; processes of torchrun share them."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class FileImages(Images):
    """Images in files, all shown as RGB squares of one size.

    What a sample looks like is a function of its file, and in training of (key, sample id, view): the number of
    workers changes nothing but the speed.

    Args:
        folder: Where the files are.
        names: The files, relative to it.
        sizes: Their lengths in bytes; they tell one set of files from another of the same names.
        labels: The data set's own labels.
        framing: Which part of a picture is shown, at which size.
        num_workers: Processes that decode; 0 decodes in this one, None takes `default_num_workers()`.
        prefetch: Batches that every worker makes ahead.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        sizes: Int64[Tensor, " samples"],
        labels: Int64[Tensor, " samples"],
        *,
        framing: Framing,
        num_workers: int | None = None,
        prefetch: int = 2,
    ) -> None:
        assert len(names) == len(sizes) == len(labels), (len(names), len(sizes), len(labels))
        self.labels, self.sizes, self.framing = labels, sizes, framing
        self.num_workers = default_num_workers() if num_workers is None else num_workers
        self.prefetch = prefetch
        self._files = _Files(folder.absolute(), names, framing)
        self._requests = _Requests()
        self._loader: DataLoader[Tensor | ValueError] | None = None
        self._turn = 0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, self.framing.image_size, self.framing.image_size

    def path(self, index: int) -> Path:
        """The file of a sample id."""
        return self._files.path(index)

    def fetch(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch channels height width"]:
        """The middle of some images, decoded here and now.

        Raises:
            ValueError: If a file is no image, or a damaged one.
        """
        return self._files.read(indices.tolist(), [0] * len(indices), None)

    def stream(self, plan: Plan, key: int | None) -> Iterator[UInt8[Tensor, "_ channels height width"]]:
        """The images of one batch after another, decoded ahead by the workers, which stay for the next stream.

        One stream at a time: a new one ends the one before.

        Raises:
            ValueError: If a file is no image, or a damaged one.
        """
        requests = ((ids.tolist(), views.tolist(), key) for ids, views in plan)
        for found in self._from_workers(requests) if self.num_workers else map(self._files.__getitem__, requests):
            if isinstance(found, ValueError):
                raise found
            yield found

    def content(self) -> Iterator[bytes]:
        """How images are shown in testing, labels, and names and lengths of the files: not their pixels."""
        framing = self.framing
        yield repr((framing.image_size, framing.resize, framing.interpolation)).encode()
        for part in (self.labels, self._files.names, self.sizes):
            yield part.numpy().tobytes()

    def _from_workers(self, requests: Iterable[Request]) -> Iterator[Tensor | ValueError]:
        if self._loader is None:
            self._loader = DataLoader(
                self._files,
                sampler=self._requests,
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch,
                persistent_workers=True,
                pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # the run computes there
                multiprocessing_context=_context(),
                generator=torch.Generator(),  # lest it draw from the global one
            )
            # Holds the loader until this object is gone: torch ends the workers at once when the loader goes alone, and
            # waits 5 seconds for each when the garbage collector takes it with others.
            weakref.finalize(self, _let_go, self._loader)
        self._turn += 1
        turn = self._turn
        self._requests.pending = requests
        batches = iter(self._loader)
        self._requests.pending = ()  # they may know these images, which would then never go
        for found in batches:
            yield found
            assert turn == self._turn, "a stream was read on after a newer one of the same images had begun"


class _Files(Dataset[Tensor | ValueError]):
    """What the workers get. Names are in tensors, which processes share; a list would be copied for each."""

    def __init__(self, folder: Path, names: Sequence[str], framing: Framing) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.folder, self.framing = os.fsencode(folder), framing
        self.names = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def path(self, index: int) -> Path:
        name = self.names[int(self.ends[index]) : int(self.ends[index + 1])].numpy().tobytes()
        return Path(os.fsdecode(os.path.join(self.folder, name)))

    def read(self, ids: list[int], views: list[int], key: int | None) -> Tensor:
        side = self.framing.image_size
        images = torch.empty(len(ids), 3, side, side, dtype=torch.uint8)
        draws: list[list[float]] | list[None] = [None] * len(ids)
        if key is not None:
            noise = SampleNoise(key, torch.tensor(ids, dtype=torch.int64), torch.tensor(views, dtype=torch.int64))
            draws = noise.uniform("random resized crop", NUM_DRAWS).tolist()
        for image, index, numbers in zip(images, ids, draws, strict=True):
            pixels = self.framing.read(self.path(index), numbers)
            image.copy_(rearrange(torch.tensor(pixels), "h w c -> c h w"))
        return images

    def __getitem__(self, request: Request) -> Tensor | ValueError:
        """A batch, or what is wrong with it: raised in a worker, it would come with the worker's traceback as text."""
        try:
            return self.read(*request)
        except ValueError as error:
            return ValueError(str(error))


class _Requests:
    """The sampler of a loader whose epochs are told to it one by one."""

    def __init__(self) -> None:
        self.pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)


def _let_go(loader: DataLoader[Tensor | ValueError]) -> None:
    """Nothing: whoever was to call this held the loader, and now does not."""


def _context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server of their own, since this process has threads that a fork would cut off."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    return context
