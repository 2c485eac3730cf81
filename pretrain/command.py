"""`peerlearn pretrain` and `peerlearn resume`."""

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn.config import config_to_yaml, load_config, parse_config
from peerlearn.errors import UserError
from peerlearn.run_dir import RunDirectory
from pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from pretrain.state import Training
    from pretrain.train import Stop

SHIPPED = Path(__file__).parent / "configs"
SAVED_RUN_AGAIN = 75


def main(argv: Sequence[str]) -> int:
    """`peerlearn pretrain [CONFIG] [--key value ...] [--dry_run]`. Returns the exit code."""
    config, dry_run = parse_config(
        PretrainConfig,
        argv,
        verb="pretrain",
        description="Pretrain a cohort of networks that teach each other.",
        example="peerlearn pretrain mcl_fashion_mnist_demo --epochs 2 --run runs/try",
        shipped=SHIPPED,
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return 0
    root = Path(config.run) if config.run else Path("runs") / _default_name(argv)
    run = RunDirectory(root)
    run.check_new()
    return _run(config, run)


def resume(argv: Sequence[str]) -> int:
    """`peerlearn resume RUN`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="peerlearn resume",
        description="Continue a run from its latest checkpoint. Example: peerlearn resume runs/demo",
    )
    parser.add_argument("run", type=Path, help="the run directory")
    run = RunDirectory(parser.parse_args(argv).run)
    run.check_exists()
    if run.done:
        print(f"{run.root} is done already")
        return 0
    return _run(load_config(PretrainConfig, run.config), run)


def _default_name(argv: Sequence[str]) -> str:
    """The config's name, for a run that was given none."""
    named = argv and not argv[0].startswith("-")
    return Path(argv[0]).stem if named else "pretrain"


def _run(config: PretrainConfig, run: RunDirectory) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training in several processes is not supported yet: start a single one")
    # Imported here: a wrong key should not wait for torch.
    from pretrain.state import build, resume_latest
    from pretrain.train import stop_signals

    # Before anything is written: data or networks that cannot be had leave no run behind.
    training = build(config, run)
    if not run.config.exists():
        run.create(config_to_yaml(config))
    attempt, log_file = run.start_attempt(
        {
            "dataset": training.dataset.name,
            "data_root": training.data_root,
            "images": len(training.dataset),
            "seed": config.seed,
            "lr": config.lr,
        }
    )
    log_to(log_file)
    try:
        with stop_signals() as stop:
            resume_latest(training)
            finished = _train(training, attempt, stop)
    except Exception as error:
        logging.getLogger(__name__).exception("the run failed")
        # A full disk may be what failed; then these fail too, and must not hide it.
        with contextlib.suppress(OSError):
            run.event("failed", attempt=attempt, reason=str(error))
            run.mark_failed(str(error))
        if isinstance(error, UserError):
            raise
        raise UserError(f"{type(error).__name__}: {error} (traceback in {log_file})") from error
    if not finished:
        print(f"saved; `peerlearn resume {run.root}` continues")
        return SAVED_RUN_AGAIN
    return 0


def _train(training: "Training", attempt: int, stop: "Stop") -> bool:
    from peerlearn.progress import progress
    from pretrain.metrics import MetricsLog
    from pretrain.summary import print_summary
    from pretrain.train import measure_untrained, train

    config, run, dataset = training.config, training.run, training.dataset
    run.event(
        "started",
        attempt=attempt,
        step=training.step,
        total_steps=training.total_steps,
    )
    print(
        f"{run.root}: {config.method}, {config.cohort.networks} x {config.cohort.backbones} on "
        f"{len(dataset):,} images of {dataset.name}, {training.device}, "
        f"steps {training.step} to {training.total_steps}",
        flush=True,
    )
    log = MetricsLog(
        run,
        attempt=attempt,
        step=training.step,
        steps_per_epoch=training.steps_per_epoch,
        batch_size=config.batch_size,
    )
    with progress(training.total_steps, "step", done=training.step) as report:
        if training.step == 0:
            measure_untrained(training, log, report)
        finished = train(training, log, report, stop)
    log.close()
    run.event("done" if finished else "stopped", attempt=attempt, step=training.step)
    if finished:
        run.mark_done()
        print_summary(run, dataset.name)
    return finished


def log_to(file: Path) -> None:
    """Send every log record to the file, and warnings to the terminal, where no traceback belongs."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    to_file = logging.FileHandler(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = logging.StreamHandler()
    to_terminal.setLevel(logging.WARNING)
    to_terminal.addFilter(lambda record: not record.exc_info)
    to_terminal.setFormatter(logging.Formatter("%(message)s"))
    root.handlers = [to_file, to_terminal]
    logging.captureWarnings(True)
