"""Processes that share the batches of a run, as actors of Ray: each runs the experiment, with a model of its own, and
does those batches that it is given. The process that began the run does what follows; on the CPUs of one machine it is
one of the workers, elsewhere it waits.

A worker that dies is started again. Whoever has nothing left to do does again what others have not finished, so that
a lost machine stops nobody: a batch is the same file whoever makes it.
"""

import contextlib
import dataclasses
import importlib
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from vlm_mech.errors import UsageError, WorkError
from vlm_mech.runs.configuration import ConfigT
from vlm_mech.runs.freed_memory import keep_freed_memory
from vlm_mech.runs.shards import PartDone
from vlm_mech.runs.starting_ray import single_threaded, start
from vlm_mech.runs.workspace import PARTIAL, Workspace

RESTARTS = 3
"""How often a worker that died is started again."""
POLL = 0.1
"""Seconds between two looks at what is done."""
LAST_WORDS = 10.0
"""Seconds that workers have to end once nothing is left to do."""
PATIENCE = 3.0
"""How many times its own longest batch the process that began a run waits for another's before it does it again."""
SHORTEST = 1.0
"""Seconds that its longest batch is taken to have been at least."""
HERE = "here"
"""Its name among the workers."""


class Deal:
    """Who does which batch of a loop. An actor of its own."""

    def __init__(self) -> None:
        self.keys: list[str] | None = None
        self.done: set[str] = set()
        self.doers: dict[str, list[str]] = {}

    def offer(self, keys: list[str], done: list[str]) -> None:
        """The keys of the loop, as a worker finds them.

        Raises:
            WorkError: another worker found other ones.
        """
        if self.keys is None:
            self.keys, self.done = keys, set(done)
        elif self.keys != keys:
            raise WorkError("workers see different batches: data, model or code differ between them")

    def take(self, worker: str, last: str | None, again: bool = True) -> str | None:
        """The next key for a worker, whose `last` one is done now; None when there is none for it.

        Args:
            again: when all are given away, those that others have not finished, the least often given first.
        """
        if last is not None:
            self.done.add(last)
        left = [key for key in self.keys or () if key not in self.done and (again or key not in self.doers)]
        chosen = min(left, key=lambda key: len(self.doers.get(key, ())), default=None)
        if chosen is not None:
            self.doers.setdefault(chosen, []).append(worker)
        return chosen

    def state(self) -> tuple[int, int | None]:
        """How many batches are done, and of how many; None while no worker has come to the loop."""
        return len(self.done), None if self.keys is None else len(self.keys)


@dataclass
class Given:
    """The share of a worker: what it is given of one loop, those before it having been done."""

    deal: Any
    loop: int
    worker: str
    seen: int = 0

    ends_at_collect = False

    def of(self, keys: Sequence[str], name: str, done: Mapping[str, bool]) -> Iterator[str]:
        """The keys that are dealt to this worker.

        Raises:
            PartDone: all of the loop is done.
        """
        import ray

        self.seen += 1
        if self.seen - 1 < self.loop:
            return
        ray.get(self.deal.offer.remote(list(keys), [key for key, kept in done.items() if kept]))
        take: Any = self.deal.take.remote
        key: Any = None
        while (key := ray.get(take(self.worker, key))) is not None:
            yield key
        raise PartDone


class Worker:
    """Runs an experiment up to the end of one of its loops. An actor."""

    def work(self, deal: Any, module: str, options: dict[str, Any], folder: Path, token: str, loop: int) -> None:
        """Does what it is given of a loop.

        Raises:
            UsageError: the folder of the run cannot be seen from here.
        """
        import ray

        if not (folder / PARTIAL / token).is_file():
            raise UsageError(
                f"{str(folder)!r} is not seen from {platform.node()}; workers need a folder that all machines see, "
                "or do --shard on each and copy the shards together"
            )
        keep_freed_memory()
        experiment = importlib.import_module(module)
        share = Given(deal, loop, ray.get_runtime_context().get_worker_id())
        with contextlib.suppress(PartDone):
            experiment.run(experiment.Config(**options), Workspace(folder, share=share))


@dataclass
class Dealt:
    """One loop of a run as it is dealt out: the workers that do it, and their calls that have not ended."""

    deal: Any
    workers: list[Any]
    waiting: list[Any]
    token: Path
    died: Exception | None = None

    @property
    def n_done(self) -> tuple[int, int | None]:
        """As `Deal.state` says."""
        import ray

        return ray.get(self.deal.state.remote())

    @property
    def all_done(self) -> bool:
        """Whether nothing is left."""
        n_done, n_all = self.n_done
        return n_done == n_all

    def look(self, timeout: float = 0) -> None:
        """Waits until a call has ended, no longer than so many seconds; what a worker raised is raised here."""
        import ray

        if not self.waiting:
            return
        ended, self.waiting = ray.wait(self.waiting, timeout=timeout)
        for call in ended:
            try:
                ray.get(call)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                self.died = error

    def kill(self) -> None:
        """No worker runs any more."""
        import ray

        for each in self.workers:
            ray.kill(each)
        ray.wait(self.waiting, num_returns=len(self.waiting), timeout=LAST_WORDS) if self.waiting else None
        self.waiting = []

    def end(self) -> None:
        """Nothing of it runs any more."""
        import ray

        self.kill()
        ray.kill(self.deal)
        self.token.unlink(missing_ok=True)


@dataclass
class Crew(Generic[ConfigT]):
    """The workers of one run, as the share of the process that began it: each loop with work left is done by them."""

    config: ConfigT
    module: str
    folder: Path
    n_workers: int
    n_gpus: int
    works: bool
    """Whether this process is one of them."""
    seen: int = 0
    begun: Dealt | None = None

    ends_at_collect = False

    def of(self, keys: Sequence[str], name: str, done: Mapping[str, bool]) -> Iterator[str]:
        """What this process is given, or what workers left undone: nothing."""
        self.seen += 1
        left = [key for key in keys if not done[key]]
        if self.works and (left or self.begun is not None):
            return self._own(keys, name, [key for key in keys if done[key]])
        if self.seen > 1 and left:
            self.do(self.seen - 1, name)
            return iter(())
        return iter(left)

    def start(self) -> None:
        """Has the first loop begun: where this process is no worker, it loads nothing before that loop is done.

        A GPU has room for one model, and what workers do first they all do.
        """
        if self.works:
            # Where batches are kept already, there may be nothing left to do.
            if not any((self.folder / PARTIAL).glob("*.parquet")):
                self.begin(0)
        else:
            self.do(0, "batches")

    def end(self) -> None:
        """No worker runs any more."""
        if self.begun is not None:
            self.begun.end()
            self.begun = None

    def begin(self, loop: int) -> Dealt:
        """Starts the workers of a loop."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        token = self.folder / PARTIAL / f"{uuid.uuid4().hex}.json"
        token.touch()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        deal = ray.remote(Deal).options(num_cpus=0, scheduling_strategy=here).remote()
        how = {"num_cpus": 1, "num_gpus": self.n_gpus, "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        workers = [ray.remote(Worker).options(**how).remote() for _ in range(self.n_workers - self.works)]
        options = {each.name: getattr(self.config, each.name) for each in dataclasses.fields(self.config)}
        waiting = [each.work.remote(deal, self.module, options, self.folder, token.name, loop) for each in workers]
        self.begun = Dealt(deal, workers, waiting, token)
        return self.begun

    def do(self, loop: int, name: str) -> None:
        """Has the workers do a loop.

        Raises:
            WorkError: each of them died more often than it is started again; or whatever one of them raised.
        """
        dealt = self.begin(loop)
        try:
            with self._bar(name) as bar:
                while dealt.waiting and not _told(dealt, bar):
                    dealt.look(POLL)
            if dealt.died is not None and not dealt.all_done:
                died = " ".join(str(dealt.died).split())
                raise WorkError(f"all workers died, the last one of this: {died:.300}") from dealt.died
        finally:
            self.end()

    def _own(self, keys: Sequence[str], name: str, done: Sequence[str]) -> Iterator[str]:
        """What this process is given of a loop, until all of it is done."""
        import ray

        dealt = self.begun if self.begun is not None else self.begin(self.seen - 1)
        take: Any = dealt.deal.take.remote
        key: Any = None
        longest = 0.0
        try:
            with _dealing(), self._bar(name) as bar:
                ray.get(dealt.deal.offer.remote(list(keys), list(done)))
                while (key := ray.get(take(HERE, key, again=False))) is not None:
                    _told(dealt, bar)
                    started = time.monotonic()
                    yield key
                    longest = max(longest, time.monotonic() - started)
                    dealt.look()
                # Others are still at it.
                started, patience = time.monotonic(), PATIENCE * max(longest, SHORTEST)
                while dealt.waiting and not _told(dealt, bar) and time.monotonic() - started < patience:
                    dealt.look(POLL)
                if not _told(dealt, bar):
                    # Whoever takes far longer than this process did may have stopped, with a lock in its hands.
                    dealt.kill()
                while (key := ray.get(take(HERE, key))) is not None:
                    yield key
                _told(dealt, bar)
        finally:
            self.end()

    def _bar(self, name: str) -> Any:
        from tqdm.auto import tqdm

        return tqdm(desc=f"{name}, {self.n_workers} workers", disable=None)


@contextlib.contextmanager
def _dealing() -> Iterator[None]:
    """What the actor that deals the batches raises is raised here; that it is gone is said."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise WorkError(
            f"the process that deals the batches is gone ({' '.join(str(error).split()):.100}); the same command with "
            "--resume goes on"
        ) from error


def _told(dealt: Dealt, bar: Any) -> bool:
    """Whether all is done, which the bar shows."""
    bar.n, bar.total = dealt.n_done
    bar.refresh()
    return bar.n == bar.total


def crew_of(config: ConfigT, module: str, folder: Path) -> Crew[ConfigT]:
    """The crew that the options ask for, once Ray is started or joined; it stays so for the rest of the process.

    Args:
        module: of the experiment.
        folder: of the run.

    Raises:
        UsageError: Ray is not there, cannot be reached, or has fewer CPUs or GPUs than workers are asked for.
    """
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError('--workers and --ray need Ray: pip install "vlm_mech[ray]"; --shard does without') from error
    if config.ray is None and config.device == "cpu":
        single_threaded()
    if not ray.is_initialized():
        start(config.ray)
    kind = "CPU" if config.device == "cpu" else "GPU"
    most = int(ray.cluster_resources().get(kind, 0))
    asked = config.workers if config.workers > 1 else max(1, most)
    if asked > most:
        raise UsageError(f"--workers is {asked}, of one {kind} each; Ray has {most}")
    where = "this machine" if config.ray is None else ray.get_runtime_context().gcs_address
    works = config.ray is None and kind == "CPU"
    print(f"workers: {asked}, of one {kind} each, of Ray on {where}{', this process one of them' * works}")
    return Crew(_within_memory(config, asked), module, folder.resolve(), asked, int(kind == "GPU"), works)


def _within_memory(config: ConfigT, n_workers: int) -> ConfigT:
    """The options, with the memory of one machine divided among its workers where a sweep would take half of it."""
    if getattr(config, "memory", "") is not None or config.ray is not None or config.device != "cpu":
        return config
    import psutil

    return dataclasses.replace(config, memory=str(psutil.virtual_memory().total // 2 // n_workers))
