"""What the files of a run directory are: patterns of their paths below it, and their meaning."""

import re

# In a pattern, N is a step of eight digits, K the number of a start, R a rank, M a network, NAME any name.
FILES = {
    "RUN/config.yaml": "resolved config: every key with its value",
    "RUN/env.json": "facts for evaluators (data, seed, processes), versions, hardware",
    "RUN/metrics.jsonl": "figures, one JSON object a logged step (metrics.md)",
    "RUN/events.jsonl": "what happened, one JSON object an event, in order (events.md)",
    "RUN/notes.jsonl": "notes and tags of `peerlearn note`; lines are only added",
    "RUN/tb/NAME": "the rows of metrics.jsonl for TensorBoard",
    "RUN/owner.json": "process that holds the run, renewed every 5 seconds",
    "RUN/.lock": "lock of the process that holds the run",
    "RUN/DONE": "mark of a run that has come to its end",
    "RUN/FAILED": "mark of a run that has failed; the last line is the reason",
    "RUN/logs/attempt-K/rank-R.log": "log of a process, with tracebacks",
    "RUN/logs/attempt-K/rank-R.heartbeat.json": "sign of life of a process",
    "RUN/logs/attempt-K/rank-R.step": "step that a process is at, for what looks after its job",
    "RUN/logs/attempt-K/standing.json": "how the run stands: step, rate, time left, newest scores",
    "RUN/checkpoints/latest": "name of the newest save's folder",
    "RUN/checkpoints/step-N/NAME.safetensors": "tensors of a save: networks, key_networks, queue, optimizer, rng, ...",
    "RUN/checkpoints/step-N/state.json": "plain values of a save: step, config, environment, counts",
    "RUN/checkpoints/step-N/manifest.json": "SHA-256 of each file of a save, written last",
    "RUN/export/latest": "name of the newest export's folder",
    "RUN/export/best": "name of the export that validation chose",
    "RUN/export/step-N/net-M/model.safetensors": "weights of network M's backbone, by timm's names",
    "RUN/export/step-N/net-M/config.json": "architecture and images of network M for timm, and seals of both files",
    "RUN/export/step-N/net-M/README.md": "model card: how to load the network, and where it comes from",
    "RUN/results/NAME.json": "a score: metrics, whole protocol, hashes of exports, seed, versions, hardware, seconds",
    "RUN/results/NAME.png": "picture of a score",
    "RUN/replay/step-N/NAME": "a step that was computed again by `peerlearn replay`",
    "RUN/mirror/NAME": "how far each experiment tracker has the run",
    "RUN/slurm/NAME": "submissions of the run",
    "RUN/evaluations/NAME": "evaluations that a study or `peerlearn watch` has ordered",
}  # fmt: skip

_PARTS = {"N": r"\d{8}", "K": r"\d+", "R": r"\d+", "M": r"\d+(-key)?", "NAME": r".+"}


def meaning_of(path: str) -> str | None:
    """What a file is, by its path below the run directory; None for a file that no run has."""
    for pattern, meaning in FILES.items():
        parts = re.split(r"\b(NAME|N|K|R|M)\b", pattern.removeprefix("RUN/"))
        spelt = "".join(_PARTS.get(part, re.escape(part)) for part in parts)
        if re.fullmatch(spelt, path):
            return meaning
    return None
