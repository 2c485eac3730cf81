"""What the events of events.jsonl are: every kind that a run may write, and its facts."""

# Kind -> when it is written, and what its facts are. Every line has `time` and `event` too.
EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "started": (
        "A start of the run begins to train.",
        {
            "attempt": "number of the start, from 1",
            "step": "step that it goes on from",
            "total_steps": "step at which the run ends",
            "processes": "number of processes",
            "layout": 'which of them have what, where not all have the same; else ""',
        },
    ),
    "lock_taken_over": (
        "The start found the lock of a process that is dead.",
        {"attempt": "number of the start", "owner": "process that held the lock"},
    ),
    "initial_weights": (
        "Networks begin with weights of files (`cohort.init`).",
        {"networks": "of each network its source, its SHA-256, and the names that did not fit"},
    ),
    "identity": (
        "An evaluation that trains notes what it trains, so that only the same command goes on with it.",
        {},
    ),
    "saved": ("A save is whole.", {"step": "step of the save", "seconds": "time that it took"}),
    "save_missed": (
        "A save did not fit on the disk; the older saves stay.",
        {"step": "step of the save", "reason": "answer of the system"},
    ),
    "exported": (
        "The networks of a step are exported.",
        {"step": "step of the export", "best": "true where validation chose the step"},
    ),
    "export_missed": (
        "An export did not fit on the disk.",
        {"step": "step of the export", "reason": "answer of the system"},
    ),
    "detector_missed": (
        "A detector did not fit on the disk.",
        {"step": "step of the detector", "reason": "answer of the system"},
    ),
    "image_unreadable": (
        "An image cannot be decoded, and another takes its place.",
        {"path": "path of the image", "reason": "answer of the decoder"},
    ),
    "collapse": (
        "The vectors of a network no longer tell images apart.",
        {
            "step": "step of the measurement",
            "network": "name of the network",
            "vectors": "features or embeddings",
        },
    ),
    "step_skipped": (
        "A step had NaN or Inf, and changed nothing.",
        {
            "step": "number of the step, from 0",
            "epoch": "epoch of the step, from 0",
            "batch": "batch of the epoch, from 0",
            "reason": "term or gradient at fault, by process",
            "images": "numbers of the images of the batch",
        },
    ),
    "rolled_back": (
        "Too many steps in a row were skipped, and the run went back to a save.",
        {
            "step": "step of the save",
            "before_step": "first step that was skipped",
            "reason": "fault of the last step",
        },
    ),
    "checkpoint_damaged": (
        "A save is not whole and was set aside.",
        {
            "folder": "name that it had",
            "moved_to": "name that it has now",
            "reason": "file at fault",
        },
    ),
    "metrics_missing": (
        "Rows of metrics.jsonl from before the save are gone.",
        {
            "step": "step of the save",
            "rows": "number of rows that the save counted",
            "found": "number of rows that are there",
        },
    ),
    "config_changed": (
        "The run goes on with other values of keys that may change.",
        {"changes": "old and new value of each key"},
    ),
    "world_size_changed": (
        "The run goes on with another number of processes.",
        {"before": "number until now", "now": "number from now on"},
    ),
    "environment_changed": (
        "The run goes on with other code, libraries or another machine.",
        {"changes": "old and new value of each fact"},
    ),
    "stopped": (
        "The run was told to stop and has saved.",
        {"attempt": "number of the start", "step": "steps done"},
    ),
    "done": (
        "The run has come to its end.",
        {"attempt": "number of the start", "step": "steps done"},
    ),
    "failed": (
        "The run has failed.",
        {
            "attempt": "number of the start",
            "rank": "process that failed",
            "reason": "error in one line",
            "kind": "user (to be mended by you), crash, or lost_rank (another process is gone)",
        },
    ),
    "requeued": (
        "A job asks SLURM to start it again.",
        {
            "job": "number of the job",
            "reason": "how the start ended",
            "step": "step of the newest save",
        },
    ),
    "job_failed": (
        "A job has ended, and no other start is tried.",
        {"job": "number of the job", "reason": "fault in one line"},
    ),
}
