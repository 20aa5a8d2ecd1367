"""Keys of a config that say where a run is and how it is called or started, and nothing about what is computed."""

PLACE = {
    *("name", "runs_dir", "overwrite", "experiment", "log", "snapshots"),
    *("data.root", "data.download", "data.num_workers", "data.prefetch"),
    "fast.cuda_graphs",  # the same operations, started at once
    *("checkpoint.every_seconds", "checkpoint.every_steps", "checkpoint.every_epochs"),
}
