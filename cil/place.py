"""Keys of a config that say where a run is and what it is called, and nothing about what is done."""

PLACE = {
    *("name", "runs_dir", "overwrite", "experiment", "log", "snapshots"),
    *("data.root", "data.download", "data.num_workers", "data.prefetch"),
    *("checkpoint.every_seconds", "checkpoint.every_steps", "checkpoint.every_epochs"),
}
