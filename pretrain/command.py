"""`peerlearn pretrain`, and `peerlearn resume` of its runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn.commands.configs_command import print_recipes
from peerlearn.compute import trainer
from peerlearn.errors import USAGE
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import why_not_whole
from peerlearn.runs.export_log import last_steps
from peerlearn.runs.step_folders import step_folder, step_folders
from peerlearn.runs.training_facts import TrainingFacts
from pretrain.config import PretrainConfig
from pretrain.own_data import with_choices

if TYPE_CHECKING:
    from peerlearn.compute.program import Program
    from pretrain.state import Training

SHIPPED = Path(__file__).parent / "configs"


def main(argv: Sequence[str]) -> int:
    """`peerlearn pretrain [CONFIG] [--key value ...] [--auto_resume] [--dry_run]`. Returns the exit code.

    Images of one's own without a config get settings that fit them. Without a word of what to train it prints the
    recipes: nobody should start 46,800 steps by asking what there is.
    """
    if all(word.split("=")[0] == "--run" for word in argv if word.startswith("-")) and (
        not argv or argv[0].startswith("-")
    ):
        print_recipes("pretrain")
        return USAGE
    words = [word for word in argv if word != trainer.AUTO_RESUME]
    resumes = argv[len(words) :] and [trainer.AUTO_RESUME]
    if words and words[0].startswith("-"):
        words = with_choices(words, auto_resume=bool(resumes))
    return trainer.start(_TRAINER, [*words, *resumes])


def resume(argv: Sequence[str]) -> int:
    """`peerlearn resume RUN [--allow_elastic] [--key value ...]`. Returns the exit code."""
    return trainer.resume(_TRAINER, argv)


def lacks_results(config: PretrainConfig, run: RunDirectory) -> bool:
    """Whether what the end of a run writes is not there (any more): its last exports, the results of its method."""
    from pretrain.method import method_class

    # Without a save nothing can be written again.
    if step_folders(run.checkpoints) and any(
        why_not_whole(run.exports / step_folder(step), config.cohort.networks)
        for step in last_steps(run)
    ):
        return True
    return method_class(config.method).lacks_results(run)


def _program() -> "Program[Training]":
    from peerlearn.compute.program import Program
    from pretrain.state import build
    from pretrain.summary import print_summary
    from pretrain.train import train

    def finish(training: "Training") -> None:
        training.results = training.method.results(training)

    def summarise(training: "Training") -> None:
        print_summary(training.run, training.dataset.title, training.results)

    return Program(build=build, train=train, facts=_facts, finish=finish, summarise=summarise)


def _preview(config: PretrainConfig) -> list[str]:
    # Imported here: reading a config does not wait for torch.
    from pretrain.preview import preview

    return preview(config).lines


def _facts(training: "Training") -> TrainingFacts:
    """What evaluators need to know of the training."""
    return TrainingFacts(
        dataset=training.dataset.name,
        data_root=training.data.root,
        images=len(training.dataset),
        seed=training.config.seed,
        lr=training.config.lr,
        processes=training.ranks.world_size,
        steps_per_epoch=training.steps_per_epoch,
        initial_weights=[each.as_json() for each in training.initial_weights],
    )


_TRAINER = trainer.Trainer(
    verb="pretrain",
    config_class=PretrainConfig,
    description="Pretrain a cohort of networks that teach each other.",
    example="peerlearn pretrain mcl_fashion_mnist_demo --epochs 2 --run runs/try",
    program=_program,
    essential=(
        *("run", "seed", "epochs", "method", "batch_size", "base_lr", "temperature", "device"),
        *("precision", "cohort.networks", "cohort.backbones", "data.name", "data.root"),
        *("data.backend", "data.limit", "data.augmentation", "data.image_size", "data.workers"),
    ),
    shipped=SHIPPED,
    lacks_results=lacks_results,
    preview=_preview,
)
