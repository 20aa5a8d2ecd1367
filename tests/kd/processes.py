"""Runs a function in two processes that train together, as a launcher would start them."""

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_SECONDS = 120

# one server imports torch, once; the processes are forked from it, before it has any thread
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "pytest", "hypothesis", "kd"])


def in_processes(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """What `function(*arguments)` returns in every process, in their order; `function` stands at the top of a module.

    Raises:
        AssertionError: With the tracebacks of the processes that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(world_size):
            here, there = _context.Pipe(duplex=False)
            words = (there, rank, world_size, Path(folder) / "meeting", function, arguments)
            process = _context.Process(target=_work, args=words, daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
        try:
            answers = [_answer(here) for _, here in workers]
            failures = [value for done, value in answers if not done]
            assert not failures, "\n".join(failures)
            return [value for _, value in answers]
        finally:
            for process, here in workers:
                process.kill()
                process.join()
                here.close()


def _answer(here: Connection) -> tuple[bool, Any]:
    """Whether a process came to its end, and what it returned, or else the traceback."""
    assert here.poll(PATIENCE_SECONDS), f"no answer in {PATIENCE_SECONDS} seconds"
    answer: tuple[bool, Any] = torch.load(io.BytesIO(here.recv_bytes()), weights_only=False)
    return answer


def _work(
    there: Connection,
    rank: int,
    world_size: int,
    meeting: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
        answer = True, function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        answer = False, f"process {rank}:\n{traceback.format_exc()}"
    data = io.BytesIO()
    torch.save(answer, data)
    there.send_bytes(data.getvalue())
