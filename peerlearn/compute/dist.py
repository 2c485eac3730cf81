"""The processes of one job ("ranks") and their communication.

Everything works unchanged for a single process, where nothing is sent. A launcher (torchrun, accelerate, SLURM) is
recognised by the environment it sets; accelerate picks the device and the backend.
"""

import datetime
import faulthandler
import json
import logging
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from peerlearn.compute.device import choose_device
from peerlearn.errors import CrashError, SaidByMainError, UserError
from peerlearn.runs.heartbeat import Heartbeat, SilenceWatch, name_culprits
from peerlearn.runs.launcher import MEETING_SOCKET
from peerlearn.runs.stop import StoppedError, not_interrupted

# How long the other ranks wait while the main rank evaluates or writes to slow storage.
_PATIENCE_SECONDS = 2 * 3600.0
_POLL_SECONDS = 0.01
_EVALUATION_TIMEOUT_SECONDS = 600.0
# Elements of one all-reduce: enough to use the bandwidth, and few enough for a small copy and for the first ones to be
# sent while backward still computes the others.
_BUCKET_ELEMENTS = 2**22
# Newer versions of torch have another name for it, and warn of the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

T = TypeVar("T")
T_Tensor = TypeVar("T_Tensor", bound=Tensor)

logger = logging.getLogger(__name__)


class Ranks:
    """This process among the processes of the job.

    Attributes:
        rank: number of this process, 0..world_size-1; 0 is the main rank, which writes the run directory.
        world_size: number of processes.
        device: device that this process computes on.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        timeout_seconds: float = math.inf,
        patient_group: dist.ProcessGroup | None = None,
        group: dist.ProcessGroup | None = None,
        part_of: "Ranks | None" = None,
    ) -> None:
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self._timeout_seconds = timeout_seconds
        self._patient_group = patient_group
        # None = of all processes.
        self._group = group
        self._part_of = part_of
        self._heartbeat: Heartbeat | None = None
        self._stacks: TextIO | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        # A copied network still belongs to the same process.
        return self

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def split(self, teams: Sequence[Sequence[int]]) -> "Ranks":
        """This process among those of its team alone. All ranks call it together, with the same teams.

        Args:
            teams: numbers of the ranks of each team; every rank is in one of them.

        Returns:
            The team, for sums and gathers within it; its first rank has number 0 there.
        """
        if len(teams) == 1:
            return self
        own = self
        timeout = None
        if self._timeout_seconds < threading.TIMEOUT_MAX:
            timeout = datetime.timedelta(seconds=self._timeout_seconds)
        for team in teams:
            # Every process has to know of every group.
            group: Any = dist.new_group(list(team), timeout=timeout)
            if self.rank in team:
                own = Ranks(
                    self.device,
                    rank=list(team).index(self.rank),
                    world_size=len(team),
                    group=group,
                    part_of=self,
                )
        return own

    def start_heartbeat(self, folder: Path, stacks: TextIO) -> None:
        """Start this rank's heartbeat in ``folder``, by which the others can name it if it dies.

        Once a step takes longer than the ranks' timeout, the stacks of all threads are written to ``stacks``.
        """
        if self._heartbeat:
            # Of the run before: an evaluation may fine-tune one after another.
            self._heartbeat.end()
        self._heartbeat = Heartbeat(folder, self.rank)
        self._stacks = stacks

    def at_step(self, step: int) -> None:
        """Note that the rank begins this step, so that others can see its progress and where it died."""
        if self._heartbeat:
            self._heartbeat.at_step(step)
        if self._stacks and self._timeout_seconds < threading.TIMEOUT_MAX:
            faulthandler.dump_traceback_later(self._timeout_seconds, file=self._stacks)

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks, of one shape, side by side along ``dim`` in rank order. No gradient passes."""
        if self.world_size == 1:
            return tensor
        part = tensor.detach().movedim(dim, 0).contiguous()
        whole = part.new_empty((self.world_size * part.shape[0], *part.shape[1:]))
        with self._collective("gather"):
            _all_gather(whole, part, group=self._group)
        return whole.movedim(0, dim)

    def gather_with_gradient(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """`gather`, differentiable: the gradients that all ranks have for this rank's part are added up.

        So a loss that every rank computes from the whole counts ``world_size`` times in this rank's gradient. The
        mean over ranks that follows (`average_`) makes it count once.
        """
        if self.world_size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, dim, self)
        return gathered

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the ranks, in place, by few collectives for all of them.

        The shapes alone fix the order of the sums, so that a resumed run adds up as before. (Torch's DDP rearranges
        its buckets after the first step, which changes the last bits.)
        """
        if self.world_size == 1:
            return
        for bucket in buckets_of(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).div_(self.world_size)
            with self._collective("average"):
                dist.all_reduce(flat, group=self._group)
            for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def begin_sum(self, values: Tensor) -> "Sum":
        """Begin to add up a tensor over the ranks, in place. All ranks begin their sums in the same order."""
        with self._collective("average"):
            return Sum(self, values, dist.all_reduce(values, group=self._group, async_op=True))

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over all ranks, as a new tensor."""
        total = values.clone()
        if self.world_size > 1:
            with self._collective("add_up"):
                dist.all_reduce(total, group=self._group)
        return total

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on any rank. All ranks get the same answer."""
        if self.world_size == 1:
            return condition
        return bool(self.add_up(torch.tensor([float(condition)], device=self.device)) > 0)

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order. A value must be one that JSON can hold."""
        if self.world_size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(text)], device=self.device)).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(text)] = text
        rows = self.gather(padded.unsqueeze(0)).cpu().numpy()
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def to_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send tensors of any shapes to the main rank. Names that several ranks have are sent by the first of them.

        All ranks call it together; those with nothing to send too. No tensor goes to a rank that does not need it.

        Returns:
            On the main rank its own tensors as they are and those of the others on the CPU; elsewhere ``tensors``.
        """
        if self.world_size == 1:
            return dict(tensors)
        facts = self.collect(
            [[name, str(t.dtype).removeprefix("torch."), [*t.shape]] for name, t in tensors.items()]
        )
        found = dict(tensors)
        known = {name for name, *_ in facts[0]}
        for rank, own in enumerate(facts[1:], start=1):
            due = [fact for fact in own if fact[0] not in known]
            known.update(name for name, *_ in due)
            if self.rank == rank:
                self._send_to_main([tensors[name].detach().cpu() for name, *_ in due])
            elif self.main:
                parts = [torch.empty(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in due]
                self._receive(parts, rank)
                found |= {name: part for (name, *_), part in zip(due, parts, strict=True)}
        return found

    def _send_to_main(self, parts: Sequence[Tensor]) -> None:
        for bucket in buckets_of(parts):
            with self._collective("send to rank 0"):
                flat = torch.cat([part.reshape(-1) for part in bucket])
                dist.send(flat, 0, group=self._patient_group)

    def _receive(self, parts: Sequence[Tensor], rank: int) -> None:
        """Fill tensors with those that the rank sends, of the same shapes in the same order."""
        for bucket in buckets_of(parts):
            sizes = [part.numel() for part in bucket]
            flat = bucket[0].new_empty(sum(sizes))
            with self._collective(f"receive from rank {rank}"):
                dist.recv(flat, rank, group=self._patient_group)
            for part, values in zip(bucket, flat.split(sizes), strict=True):
                part.copy_(values.view(part.shape))

    def from_main(self, function: Callable[[], T]) -> T:
        """Call the function on the main rank alone; every rank gets the result, which JSON must be able to hold.

        An evaluation or a slow save may take longer than the ranks' timeout. The other ranks wait for it as long as
        the main rank's heartbeat goes on.

        Raises:
            UserError: on the main rank: the function raised it.
            SaidByMainError: on the other ranks: the function failed on the main rank.
            StoppedError: a signal interrupted the function on the main rank.
        """
        if self.world_size == 1:
            return function()
        answer: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.main:
            try:
                answer["value"] = function()
            except StoppedError as error:
                failure = error
                answer["stopped"] = str(error)
            except Exception as error:
                failure = error
                answer["error"] = str(error) or type(error).__name__
        try:
            answer = self._broadcast(answer)
        except LostRankError:
            # The same signal may have ended the others before.
            if not isinstance(failure, StoppedError):
                raise
        if failure is not None:
            raise failure
        if "stopped" in answer:
            raise StoppedError(answer["stopped"])
        if "error" in answer:
            raise SaidByMainError(answer["error"])
        value: T = answer["value"]
        return value

    def told_once(self, error: UserError) -> UserError:
        """An error that every rank meets alike, as each rank should raise it: only the main rank reports it."""
        return error if self.main else SaidByMainError(str(error))

    def main_first(self, function: Callable[[], T]) -> T:
        """Call the function on the main rank, then on the others: a download by the main rank is ready for them."""
        if self.world_size == 1:
            return function()
        values: list[T] = []
        self.from_main(lambda: values.append(function()))
        return values[0] if self.main else function()

    def close(self, failed: str | None = None) -> None:
        """End the heartbeat and, after a success, the process group."""
        faulthandler.cancel_dump_traceback_later()
        if self._heartbeat:
            self._heartbeat.end(failed)
        if self.world_size > 1 and failed is None:
            # All ranks leave together: the first to leave alone would cut the others off.
            self._broadcast({})
            dist.destroy_process_group()

    def _broadcast(self, value: dict[str, Any]) -> dict[str, Any]:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        # A rank that left halfway would take the others with it.
        with not_interrupted(), self._collective("wait for rank 0"):
            size = torch.tensor([len(text)])
            self._send_from_main(size)
            content = text if self.main else torch.empty(int(size), dtype=torch.uint8)
            self._send_from_main(content)
        answer: dict[str, Any] = json.loads(content.numpy().tobytes())
        return answer

    def _send_from_main(self, tensor: Tensor) -> None:
        work: Any = dist.broadcast(tensor, 0, group=self._patient_group, async_op=True)
        if self._heartbeat and not self.main:
            silence = SilenceWatch(self._heartbeat.folder, 0)
            while not work.is_completed():
                if silence.seconds() > self._timeout_seconds:
                    raise RuntimeError("rank 0 gives no sign of life")
                time.sleep(_POLL_SECONDS)
        work.wait()

    @contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        if self._part_of is not None:
            with self._part_of._collective(name):
                yield
            return
        if self._heartbeat:
            self._heartbeat.enter(name)
        try:
            yield
        except RuntimeError as error:  # what gloo raises; NCCL's errors are subclasses
            if self._stacks:
                faulthandler.dump_traceback(self._stacks)
            raise LostRankError(f"{self._culprits()}; rank {self.rank} stops too") from error
        finally:
            if self._heartbeat:
                self._heartbeat.leave()

    def _culprits(self) -> str:
        if self._heartbeat is None:
            return "another rank is gone (see the other ranks' messages)"
        return name_culprits(self._heartbeat.folder, rank=self.rank, world_size=self.world_size)


class Sum:
    """A sum over the ranks that is on its way."""

    def __init__(self, ranks: Ranks, values: Tensor, work: Any) -> None:
        self._ranks = ranks
        self._values = values
        self._work = work

    def wait(self) -> Tensor:
        """The sum.

        Raises:
            LostRankError: another rank is gone.
        """
        with self._ranks._collective("average"):
            self._work.wait()
        return self._values


class LostRankError(CrashError):
    """Another rank is gone. The message names that rank."""


def start_ranks(device: str, *, timeout_seconds: float) -> Ranks:
    """Join the processes that a launcher started. Without a launcher this process is the only one.

    Args:
        device: name of the device: auto, cpu, cuda, ...; each of several processes gets a GPU of its own.
        timeout_seconds: time that a rank waits for the others in a collective before it gives up.

    Raises:
        CrashError: the ranks do not find each other.
        UserError: there is no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(choose_device(device), timeout_seconds=timeout_seconds)
    kind = choose_device(device).type
    # Imported here: a single process does not need accelerate.
    from accelerate import PartialState

    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            state = PartialState(cpu=kind == "cpu", timeout=timeout, **_meeting(timeout))
    except (RuntimeError, ValueError) as error:
        raise CrashError(_not_met(error)) from error
    # Only the other ranks are patient: the main rank waits for one of them no longer than in any collective.
    patience = timeout_seconds if state.is_main_process else max(timeout_seconds, _PATIENCE_SECONDS)
    group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=patience))
    return Ranks(
        state.device,
        rank=state.process_index,
        world_size=state.num_processes,
        timeout_seconds=timeout_seconds,
        patient_group=group,
    )


def _meeting(timeout: datetime.timedelta) -> dict[str, Any]:
    """What torch needs to meet at a socket that the launcher holds; nothing if rank 0 is to open it.

    Between choosing a port and listening at it, another program could take it.
    """
    held = os.environ.get(MEETING_SOCKET)
    if held is None:
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=int(held) if rank == 0 else None,
    )
    return {"store": store, "rank": rank, "world_size": world_size}


def _not_met(error: Exception) -> str:
    rank, size = os.environ.get("RANK", "?"), os.environ["WORLD_SIZE"]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    # Further lines are of torch's own code.
    reason = " ".join(str(error).split("\n")[0].split())
    return (
        f"rank {rank} of {size} on {socket.gethostname()} did not meet the others at {place} ({reason}): start all by "
        "torchrun, accelerate launch or `peerlearn submit`, and see that the address can be reached from there"
    )


@contextmanager
def joined_ranks(
    device: str, *, timeout_seconds: float = _EVALUATION_TIMEOUT_SECONDS
) -> Iterator[Ranks]:
    """`start_ranks` for a block. After a success all ranks leave together; after a failure each leaves alone."""
    ranks = start_ranks(device, timeout_seconds=timeout_seconds)
    failed: str | None = "it was interrupted"
    try:
        yield ranks
        failed = None
    except Exception as error:
        failed = " ".join(str(error).split())
        raise
    finally:
        ranks.close(failed)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks, ctx.size = dim, ranks, tensor.shape[dim]
        return ranks.gather(tensor, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = ctx.ranks.add_up(grad.contiguous())
        return total.narrow(ctx.dim, ctx.ranks.rank * ctx.size, ctx.size), None, None


def buckets_of(tensors: Sequence[T_Tensor]) -> Iterator[list[T_Tensor]]:
    """Consecutive tensors of one dtype, of at most ``_BUCKET_ELEMENTS`` together unless a single tensor has more."""
    bucket: list[T_Tensor] = []
    elements = 0
    for tensor in tensors:
        full = elements + tensor.numel() > _BUCKET_ELEMENTS
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
