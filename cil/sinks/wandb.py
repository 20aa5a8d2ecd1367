"""Weights & Biases: `log=wandb`. Its own variables say where to, such as `WANDB_MODE=offline` and `WANDB_PROJECT`."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cil.checkpoint import write_json
from cil.sinks.base import Event, Place, Sink, scalars, sinks

PROJECT = "dkt-incremental"
KEPT = "wandb.json"


@sinks.register("wandb")
class WandB(Sink):
    """Curves over the finished epochs, the config, and the last accuracies in the summary.

    `RUN/wandb.json` keeps the id of the run and how many events it has been given, so that a run that goes on goes on
    there too, offline as well: what a resume repeats is left out, and came out the same. W&B's step is the number of
    the event.

    Args:
        folder: The run folder.
        config: The config of the run, in plain values.
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.path = folder / KEPT
        kept: dict[str, Any] = (
            json.loads(self.path.read_text()) if self.path.is_file() else {"id": secrets.token_hex(8), "given": 0}
        )
        self.id, self.given = str(kept["id"]), int(kept["given"])
        self.run: Any = wandb.init(
            id=self.id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=str(config["name"]),
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.define_metric("epochs", hidden=True)
        self.run.define_metric("*", step_metric="epochs")

    def write(self, event: Event, place: Place) -> None:
        """Its numbers, unless the run has them from the process before."""
        if place.number < self.given:
            return
        if numbers := scalars(event):
            self.run.log({**numbers, "epochs": place.epochs}, step=place.number)
        self.given = place.number + 1
        if event["event"] in ("epoch", "stage_finished", "run_finished"):
            self._keep()

    def close(self) -> None:
        """Send what is left, or write it where `wandb sync` finds it."""
        self.run.finish()
        self._keep()

    def _keep(self) -> None:
        write_json(self.path, {"id": self.id, "given": self.given})
