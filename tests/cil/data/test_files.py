import gc
import hashlib
import multiprocessing
import os
import time

import pytest
import torch

from cil.data import files
from cil.data.files import FileImages, default_num_workers
from cil.data.framing import NUM_DRAWS, Framing
from cil.seeding import SampleNoise
from tests.cil.data.pictures import write_pictures

NAMES = [f"two words/{k}.png" for k in range(6)] + [f"Füchse – 狐/{k}.png" for k in range(6)]
SIDE = 8
FRAMING = Framing(SIDE, 9, (0.2, 1.0), (3 / 4, 4 / 3), "bicubic")
KEY = 77

# more workers than a machine has cores are slow, and that is all
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path, ["two words", "Füchse – 狐"], 6)
    return tmp_path


def images(folder, num_workers=0, names=NAMES, framing=FRAMING, **changes) -> FileImages:
    given = {"sizes": torch.arange(len(names)), "labels": torch.arange(len(names)) // 6} | changes
    return FileImages(folder, names, given["sizes"], given["labels"], framing=framing, num_workers=num_workers)


def plan(*batches):
    """Batches of (id, view)."""
    return [tuple(torch.tensor(column) for column in zip(*batch, strict=True)) for batch in batches]


EPOCH = plan([(3, 0), (3, 1), (11, 0)], [(0, 0), (7, 0)], [(5, 2)], [(1, 0), (2, 0), (4, 0)], [(6, 0)])


def test_images_are_fetched_by_sample_id(folder):
    found = images(folder).fetch(torch.tensor([7, 0, 7]))
    assert found.shape == (3, *images(folder).input_shape)
    assert found.dtype == torch.uint8
    for image, index in zip(found, [7, 0, 7], strict=True):
        assert image.permute(1, 2, 0).equal(torch.tensor(FRAMING.read(folder / NAMES[index], None)))
    assert images(folder).path(7) == folder / NAMES[7]


def test_a_share_may_be_empty(folder):
    none = torch.tensor([], dtype=torch.int64)
    assert images(folder).fetch(none).shape == (0, 3, SIDE, SIDE)
    for key in (None, KEY):
        (found,) = images(folder).stream([(none, none)], key)
        assert found.shape == (0, 3, SIDE, SIDE)


def test_a_test_stream_is_what_is_fetched(folder):
    for (ids, _), found in zip(EPOCH, images(folder).stream(EPOCH, None), strict=True):
        assert found.equal(images(folder).fetch(ids))


def test_a_training_image_is_a_function_of_key_sample_and_view(folder):
    streamed = torch.cat(list(images(folder).stream(EPOCH, KEY)))
    ids, views = (torch.cat(column) for column in zip(*EPOCH, strict=True))
    numbers = SampleNoise(KEY, ids, views).uniform("random resized crop", NUM_DRAWS).tolist()
    for image, index, drawn in zip(streamed, ids.tolist(), numbers, strict=True):
        assert image.permute(1, 2, 0).equal(torch.tensor(FRAMING.read(folder / NAMES[index], drawn)))
    assert not streamed[0].equal(streamed[1])  # another view
    other = torch.cat(list(images(folder).stream(EPOCH, KEY + 1)))
    assert not other[0].equal(streamed[0])


def test_any_number_of_workers_gives_the_same_bits_stream_after_stream(folder):
    alone = images(folder)
    for num_workers in (1, 2):
        shared = images(folder, num_workers)
        state = torch.get_rng_state()
        for key in (KEY, None, KEY + 1):
            expected = list(alone.stream(EPOCH, key))
            found = list(shared.stream(iter(EPOCH), key))  # a plan may be made on the way
            assert [batch.shape for batch in found] == [batch.shape for batch in expected]
            assert all(map(torch.equal, found, expected))
        assert torch.get_rng_state().equal(state)


def test_a_stream_may_be_left_before_its_end_and_a_file_may_be_bad(folder):
    names = [*NAMES, "bad one.png"]
    (folder / "bad one.png").write_bytes(b"no image")
    bad = plan([(0, 0)], [(1, 0), (12, 0)], [(2, 0)])
    for num_workers in (0, 2):
        mine = images(folder, num_workers, names)
        stream = mine.stream(EPOCH, KEY)
        first = next(stream)
        with pytest.raises(ValueError, match=r"bad one\.png cannot be read as an image: ") as caught:
            list(mine.stream(bad, None))
        assert "\n" not in str(caught.value)  # not a worker's traceback
        again = list(mine.stream(EPOCH, KEY))
        assert len(again) == len(EPOCH)
        assert again[0].equal(first)
        if num_workers:
            with pytest.raises(AssertionError, match="after a newer one"):
                next(stream)


def test_workers_go_at_once_with_their_images(folder):
    mine = images(folder, 2)
    list(mine.stream(EPOCH, KEY))
    mine.itself = mine  # for the garbage collector to find
    workers = set(multiprocessing.active_children())
    start = time.perf_counter()
    del mine
    gc.collect()
    assert time.perf_counter() - start < 4
    assert not workers & set(multiprocessing.active_children())


def test_a_missing_file_is_named(folder):
    (folder / NAMES[4]).unlink()
    with pytest.raises(ValueError, match=r"two words/4\.png cannot be read as an image: .*No such file"):
        images(folder).fetch(torch.tensor([4]))


def test_the_content_is_what_tests_show_and_nothing_else(folder):
    def content(framing=FRAMING, **changes) -> str:
        return hashlib.sha256(b"".join(images(folder, framing=framing, **changes).content())).hexdigest()

    others = [
        content(names=[*NAMES[:-1], "other.png"]),
        content(sizes=torch.arange(12) + 1),
        content(labels=torch.zeros(12, dtype=torch.int64)),
        content(framing=Framing(SIDE, 10, (0.2, 1.0), (3 / 4, 4 / 3), "bicubic")),
        content(framing=Framing(SIDE, 9, (0.2, 1.0), (3 / 4, 4 / 3), "bilinear")),
    ]
    assert len({content(), *others}) == 6
    assert content() == content(num_workers=2)
    assert content() == content(framing=Framing(SIDE, 9, (0.5, 1.0), (1.0, 1.0), "bicubic"))  # training alone


def test_there_is_a_worker_for_each_core_up_to_eight(monkeypatch):
    for cores, processes, expected in [(4, 1, 4), (96, 1, 8), (8, 4, 2), (2, 4, 1), (1, 1, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_num_workers() == expected
    assert files.MAX_WORKERS == 8
