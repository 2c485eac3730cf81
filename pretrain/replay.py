"""A step of a run, computed again as training did it: from the save before it, or from the start.

Nothing of the run is touched but the folder RUN/replay: no event, no row, no save, and not the run's lock, so that a
run that goes on can be asked too. `pretrain.replay_files` has what is written.
"""

import contextlib
import copy
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import DivergedError, all_finite
from peerlearn.compute.resume import check_images, restore, safe_changes
from peerlearn.data.loader import ViewBatch
from peerlearn.errors import UserError
from peerlearn.runs.checkpoint import DamagedSaveError, check_whole, load_checkpoint
from peerlearn.runs.directory import RunDirectory, json_number
from peerlearn.runs.environment import environment
from peerlearn.runs.generators import seed_generators
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.lock import run_lock
from peerlearn.runs.progress import progress
from peerlearn.runs.step_folders import step_folder, step_folders
from peerlearn.runs.stop import Stop
from pretrain.config import PretrainConfig
from pretrain.fault_origin import FaultOrigin, Origin
from pretrain.initial_weights import check_unchanged
from pretrain.method import networks_of
from pretrain.parallel_config import ParallelConfig
from pretrain.replay_files import unwritable, write_step
from pretrain.rows import gradient_norms, loss_row
from pretrain.run_history import Stretch, skips, stretch_of
from pretrain.state import Training, build
from pretrain.step_record import StepRecord, first_not_finite
from pretrain.train import StepDone, mean_terms, step_row, train_step

logger = logging.getLogger(__name__)


class _Replay(Attempt[Training]):
    """Skips steps as training did, without a warning and an event.

    Attributes:
        reason: why the newest skipped step was skipped, on the main rank.
    """

    reason = ""

    def tell_skipped(self, reason: str, **facts: Sequence[Any]) -> None:
        self.reason = reason


class _Kept(NamedTuple):
    """What a training holds at one moment."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    guard: dict[str, Any]


def replay(
    config: PretrainConfig,
    run: RunDirectory,
    ranks: Ranks,
    *,
    history: list[Stretch],
    step: int,
    anomaly: bool,
) -> dict[str, Any]:
    """Compute a step again and write its folder. All ranks call it together.

    Args:
        config: config of the run.
        run: directory of the run.
        ranks: as many processes as trained the step.
        history: stretches of the run.
        step: number of the step, counted from 1, as ``step`` of a row of metrics.jsonl.
        anomaly: whether to look for the operation in which NaN or Inf arose, if any did.

    Returns:
        What step.json holds.

    Raises:
        UserError: the run cannot be computed again from any of its saves, or the folder cannot be written.
    """
    final = run.replays / step_folder(step)
    temporary = final.with_name(f".tmp-{final.name}")
    with contextlib.ExitStack() as held:
        ranks.from_main(lambda: held.enter_context(_claimed(temporary)))
        unwatched = dataclasses.replace(config.monitor, every_epochs=0)
        # Steps of networks on different processes are refused, whatever the run does by now.
        together = dataclasses.replace(config, monitor=unwatched, parallel=ParallelConfig())
        training = build(together, RunDirectory(temporary), ranks)
        training.cohort.train()
        seed_generators(config.seed, ranks.rank)
        begin = _restore(training, run, history, step)
        attempt = _Replay(training, stretch_of(history, step).attempt, Stop())
        batch, spoiling = _go_to(attempt, history, step, looks=anomaly)
        spoilt = first_not_finite(_made_by_steps(training))
        kept = _keep(training) if anomaly else None
        computed, files = _compute(attempt, batch)
        first = f"{spoilt}, before the step" if spoilt else _first_not_finite(files)
        if first is None and (name := first_not_finite(_made_by_steps(training))):
            first = f"{name}, after the step"
        agrees = ranks.from_main(lambda: _compare(training, run, computed.pop("row"), step))
        origins = []
        if kept is not None and first and not spoilt:
            origins = _find_origins(attempt, kept, batch)
        events, skipped = skips(run, step)
        epoch, number = divmod(step - 1, training.steps_per_epoch)
        facts = {
            "run": str(run.root),
            "step": step,
            "epoch": epoch,
            "batch": number,
            "from": begin["from"],
            "attempt": attempt.number,
            "processes": ranks.world_size,
            "device": str(ranks.device),
            **computed,
            "first_not_finite": first,
            "overflows": training.precision.scaler.is_enabled()
            and first_not_finite(files["gradients"]) is not None,
            "training": {"skipped": skipped, "reasons": [event["reason"] for event in events]},
            "agrees": agrees,
            "anomaly": None,
            "trained_on": begin["environment"],
            "replayed_on": environment(),
        }
        if anomaly:
            facts["anomaly"] = {
                "in_words": _origins_in_words(origins, first, spoiling),
                "origins": [origin._asdict() for origin in origins],
            }
        ranks.from_main(lambda: write_step(temporary, final, facts, files, training))
    return facts


@contextlib.contextmanager
def _claimed(temporary: Path) -> Iterator[None]:
    """Hold the folder of all replays, and in it an empty folder to write to, which is gone afterwards.

    Raises:
        InUseError: another replay of the run is at work.
        UserError: the folder cannot be written.
    """
    replays = temporary.parent
    try:
        replays.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(replays, error) from error
    with run_lock(replays):
        # What a replay that was killed has left.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _restore(
    training: Training, run: RunDirectory, history: list[Stretch], step: int
) -> dict[str, Any]:
    """Restore the newest whole save from before the step, or begin as the run did.

    Returns:
        Where the replay begins, and the environment that trained the step, as far as it is known.
    """
    ranks = training.ranks
    name = ranks.from_main(lambda: _newest_before(run.checkpoints, step))
    known = None
    if name is not None:
        folder = run.checkpoints / name

        def check(state: Mapping[str, Any]) -> None:
            safe_changes(training.config, state["config"], run.config)
            check_images(training, folder, state)

        known = restore(training, folder, check)["environment"]
    if training.step == 0:
        _begin(training, run)
    steps = range(training.step + 1, step + 1)
    stretches = [stretch_of(history, each) for each in steps]
    processes = sorted({each.processes for each in stretches})
    if processes != [ranks.world_size] or any(each.layout for each in stretches):
        raise ranks.told_once(
            UserError(
                f"steps {steps[0]} to {step} of {run.root} were trained by {' and '.join(map(str, processes))} "
                "processes in turn, or in other teams, and no save between them is left: they cannot be computed again "
                "in one go"
            )
        )
    if known is None or stretch_of(history, step) == history[0]:
        with contextlib.suppress(OSError, ValueError):
            env = read_json_object(run.env)
            known = {key: env.get(key) for key in environment()}
    return {"from": f"{run.checkpoints.name}/{name}" if name else "the start", "environment": known}


def _begin(training: Training, run: RunDirectory) -> None:
    """Begin as the run did, from the same weights.

    Raises:
        UserError: what it began from is gone, or is another by now.
    """
    try:
        training.initialise()
        training.ranks.from_main(lambda: check_unchanged(training.initial_weights, run))
    except UserError as error:
        saves = [step for step, _ in step_folders(run.checkpoints)]
        later = f"; steps after {min(saves)} can be computed from a save" if saves else ""
        raise UserError(f"{error}{later}") from error


def _newest_before(checkpoints: Path, step: int) -> str | None:
    """The name of the newest whole save of fewer steps; None without one."""
    for saved, folder in step_folders(checkpoints):
        if saved < step:
            try:
                check_whole(folder)
            except DamagedSaveError as error:
                logger.warning("passed over a damaged checkpoint: %s", error)
            else:
                return folder.name
    return None


def _go_to(
    attempt: _Replay, history: list[Stretch], step: int, *, looks: bool
) -> tuple[ViewBatch, int | None]:
    """Do the steps before a step.

    Returns:
        The batch of the step itself; and the number of the first step, if any and if it ``looks`` for it, that left NaN
        or Inf in what steps change.
    """
    training, spoiling = attempt.training, None
    todo = step - 1 - training.step
    with progress(todo, "steps", name="replaying", quiet=not training.ranks.main) as report:
        while True:
            epoch, start = divmod(training.step, training.steps_per_epoch)
            training.unreadable.begin_epoch(epoch)
            for batch in training.loader.epoch(epoch, start):
                epochs = stretch_of(history, training.step + 1).epochs
                # By the epochs of the time the learning rate falls, and the momentum of the key networks rises.
                changed = dataclasses.replace(training.config, epochs=epochs)
                training.config = training.method.config = changed
                if training.step == step - 1:
                    return batch, spoiling
                try:
                    train_step(attempt, batch)
                except DivergedError as error:
                    raise training.ranks.told_once(
                        UserError(f"{error}, on the way to step {step}: replay one of them")
                    ) from error
                training.step += 1
                if looks and not spoiling and not all_finite([*_made_by_steps(training).values()]):
                    spoiling = training.step
                report.advance()


def _compute(
    attempt: _Replay, batch: ViewBatch
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Do the step: plain values, with the row that metrics.jsonl has of such a step, and tensors by file."""
    training = attempt.training
    ranks, record = training.ranks, StepRecord()
    scale = training.precision.metrics().get("loss_scale", 1.0)
    with record.noting(training.method):
        try:
            done = train_step(attempt, batch)
        except DivergedError:
            # The last of too many in a row, here as in training.
            lr = training.optimizer.param_groups[0]["lr"]
            done = StepDone(lr, training.mutual_weight, record.terms, skipped=True)
    training.step += 1
    row = step_row(training, done)
    named = {name: p.grad for name, p in training.cohort.named_parameters() if p.grad is not None}
    if done.skipped:
        for gradient in named.values():
            # The optimiser would have divided them.
            gradient.div_(scale)
    views = {f"view/{number}": ranks.gather(view) for number, view in enumerate(batch.views)}
    views["index"] = ranks.gather(batch.index.to(ranks.device))
    if batch.labels is not None:
        views["labels"] = ranks.gather(batch.labels)
    losses = {}
    if record.terms:
        losses = loss_row(mean_terms(record.terms, ranks), training.config, done.mutual)
    computed = {
        "skipped": done.skipped,
        "reason": attempt.reason if done.skipped else None,
        "lr": done.lr,
        "loss_scale": scale,
        "losses": losses,
        "gradient_norms": gradient_norms(training.cohort) if named else {},
        "unreadable_images": [image for part in ranks.collect(batch.unreadable) for image in part],
        "row": row,
    }
    return computed, {
        "views": views,
        "outputs": record.gathered_outputs(ranks),
        "terms": record.gathered_terms(ranks),
        "gradients": named,
    }


def _first_not_finite(files: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The file and the name of the first tensor that holds NaN or Inf, in the order in which the step makes them."""
    return first_not_finite(
        {
            f"{name} of {file}.safetensors": tensor
            for file, named in files.items()
            for name, tensor in named.items()
        }
    )


def _made_by_steps(training: Training) -> dict[str, Tensor]:
    """Every tensor that steps change, by group and name."""
    best = training.method.best
    # Those follow from what the monitor measures, which a replay leaves out.
    left_out = best.state_tensors().keys() if best is not None else ()
    return {
        f"{group}/{name}": tensor
        for group, tensors in training.tensors().items()
        if group not in left_out
        for name, tensor in tensors.items()
    }


def _compare(
    training: Training, run: RunDirectory, row: Mapping[str, float], step: int
) -> dict[str, Any]:
    """Whether the step is, bit for bit, what the run has logged and saved."""
    agrees: dict[str, Any] = {"row": None, "save": None}
    logged = next((row for row in run.metric_rows() if row["step"] == step), None)
    if logged is not None:
        own = {key: json_number(value) for key, value in row.items()}
        differences = {
            key: [logged.get(key), value] for key, value in own.items() if logged.get(key) != value
        }
        agrees["row"] = {"figures": len(own), "differences": differences}
    # A run that goes on may delete it meanwhile.
    with contextlib.suppress(DamagedSaveError):
        groups, _ = load_checkpoint(run.checkpoints / step_folder(step))
        saved = {
            f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()
        }
        made = _made_by_steps(training)
        agrees["save"] = {
            "tensors": len(made),
            "differences": [
                name
                for name, tensor in made.items()
                if name not in saved or not torch.equal(tensor.cpu(), saved[name])
            ],
        }
    return agrees


def _keep(training: Training) -> _Kept:
    return _Kept(
        {
            group: {name: tensor.clone() for name, tensor in tensors.items()}
            for group, tensors in training.tensors().items()
        },
        copy.deepcopy(training.state()),
        training.guard.state(),
    )


def _find_origins(attempt: _Replay, kept: _Kept, batch: ViewBatch) -> list[Origin]:
    """Do the step once more and look at every operation: in a pass of its own, which may take other kernels."""
    training = attempt.training
    training.load(kept.tensors, kept.state)
    training.guard.load_state(kept.guard)
    training.step -= 1
    cohorts, look = networks_of(training.method), FaultOrigin()
    for cohort in cohorts:
        # A graph hides its modules.
        cohort.compiled = None
    with look.watching(cohorts), contextlib.suppress(DivergedError):
        train_step(attempt, batch)
    training.step += 1
    found = training.ranks.collect([origin._asdict() for origin in look.origins])
    return [Origin(**each) for each in next(filter(None, found), [])]


def _origins_in_words(origins: Sequence[Origin], first: str | None, spoiling: int | None) -> str:
    if origins:
        return "; then ".join(origin.in_words() for origin in origins)
    if first is None:
        return "all that the step has computed is finite"
    name, _, when = first.partition(", ")
    if when == "before the step":
        return f"step {spoiling} made {name} NaN or Inf: replay that step"
    if name.startswith("view/"):
        return f"{name} is not finite: it came with the images"
    return "no operation of torch made it: a kernel of this project hides it"
