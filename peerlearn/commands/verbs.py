"""The verbs of the command, and where each lives: imported when it is used, so that `--help` answers at once."""

from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb lives.

    Attributes:
        module: name of the module that holds the verb.
        function: name of the function that runs it: from the words after the verb to an exit code.
        help: what the verb does, for `peerlearn --help`.
        dry_run: whether the verb knows --dry_run, which prints its resolved config.
        configs: folder of the shipped configs in the package of the module; empty without.
        read: whether it works to be read alone, and without end: it stops where nobody reads its output any more.
    """

    module: str
    function: str
    help: str
    dry_run: bool = False
    configs: str = ""
    read: bool = False


VERBS = {
    "pretrain": Verb("pretrain.command", "main", "pretrain a cohort of networks", True, "configs"),
    "resume": Verb(
        "peerlearn.commands.resume_command",
        "main",
        "continue a run or a study that has stopped",
        True,
    ),
    "knn": Verb(
        "peerlearn.evaluation.knn_command", "main", "score exported networks by weighted kNN", True
    ),
    "linear": Verb(
        "linear_eval.command",
        "main",
        "train linear classifiers on exported networks",
        True,
        "configs",
    ),
    "fewshot": Verb(
        "fewshot.command", "main", "score exported networks by few-shot episodes", True
    ),
    "detect": Verb(
        "detection.command",
        "main",
        "train detectors on exported networks and score them",
        True,
        "configs",
    ),
    "submit": Verb(
        "slurm.submit_command",
        "main",
        "run any other verb as a job, on a cluster or on this machine",
        configs="clusters",
    ),
    "study": Verb(
        "studies.study_command",
        "main",
        "pretrain grids x seeds, evaluate them, compare them in tables",
        True,
        "configs",
    ),
    "table": Verb("studies.table_command", "main", "print the tables of a study"),
    "watch": Verb(
        "studies.watch_command", "main", "evaluate each export of a run once it is there"
    ),
    "measure": Verb("studies.measure", "main", "do one evaluation of a study, as its jobs do"),
    "status": Verb(
        "slurm.status_command", "main", "show the state of runs and of their jobs", read=True
    ),
    "runs": Verb(
        "peerlearn.commands.runs_command",
        "main",
        "show all runs, what differs between them and their best scores, in one table",
        read=True,
    ),
    "report": Verb(
        "peerlearn.report.report_command",
        "main",
        "write a page about runs or a study: scores, curves, pictures, configs",
    ),
    "board": Verb(
        "peerlearn.report.board_command",
        "main",
        "show all runs of a folder in a browser, as they train",
    ),
    "note": Verb("peerlearn.commands.note_command", "main", "note something of a run, and tag it"),
    "cancel": Verb("slurm.cancel_command", "main", "end the jobs of runs"),
    "logs": Verb("slurm.logs_command", "main", "print the log of a run, and follow it", read=True),
    "replay": Verb(
        "pretrain.replay_command", "main", "compute a step of a run again, and show where NaN arose"
    ),
    "export": Verb(
        "pretrain.export_command", "main", "write networks for timm, torchvision or Detectron2"
    ),
    "import": Verb(
        "peerlearn.exchange.import_command", "main", "read another program's checkpoint"
    ),
    "mirror": Verb(
        "peerlearn.exchange.mirror_command",
        "main",
        "send a run to wandb, mlflow, trackio or tensorboard, each step once",
    ),
    "data": Verb(
        "peerlearn.commands.data_command",
        "main",
        "check data sets, turn pickled ones into folders, draw a run's views",
    ),
    "configs": Verb("peerlearn.commands.configs_command", "main", "list the shipped configs"),
    "doctor": Verb(
        "peerlearn.commands.doctor", "main", "check what is installed and what is missing"
    ),
}

# Verbs of earlier versions, and what stands for them now.
FORMER_VERBS = {
    "sweep": "`peerlearn study FILE`: its grids as they are, `baseline` under `compare`",
    "pipeline": "`peerlearn study FILE`: its variants as labels of a grid, `every_epochs` as `exports`",
    "summary": "`peerlearn table FOLDER`",
}
