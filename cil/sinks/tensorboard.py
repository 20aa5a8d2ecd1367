"""TensorBoard: `log=tensorboard`, then `tensorboard --logdir runs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from cil.sinks.base import Event, Place, Sink, scalars, sinks

FLUSH_SECONDS = 10


@sinks.register("tensorboard")
class TensorBoard(Sink):
    """Curves over the finished epochs in `RUN/tensorboard`, and the config as text.

    Every process of a run writes a file with everything from the first event on, which begins by taking back what the
    files before it said (`purge_step=0`): TensorBoard shows nothing twice.

    Args:
        folder: The run folder.
        config: The config of the run, in plain values.
    """

    package: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=0, flush_secs=FLUSH_SECONDS)
        text = yaml.safe_dump(dict(config), sort_keys=False)
        self.writer.add_text("config", f"```yaml\n{text}```", global_step=0)

    def write(self, event: Event, place: Place) -> None:
        """Its numbers, at the number of finished epochs."""
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, global_step=place.epochs)

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()
