"""Cells on many devices: one Ray actor per device holds target and draft, the driver deals out cells and writes rows.

A unit is one prompt batch with all its methods, back to back on one device, so that speed-ups stay paired. The driver
alone writes files. An actor that dies has its unit run once more, on another one where there is one; a unit that
kills two actors becomes failed rows. Ray is imported here and nowhere else.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError
from specbeam.experiment import records
from specbeam.experiment.compose import nearest
from specbeam.experiment.plan import Cell, Plan, check_text, check_whole
from specbeam.experiment.progress import Progress
from specbeam.experiment.rows import Answers, failed_row, one_line, remember
from specbeam.paths import from_user

if TYPE_CHECKING:
    from rich.console import Console

EXECUTORS = ("local", "ray")
MOST_DEATHS = 2  # of actors, by one unit or while one slot loads
Outcome = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]  # rows, traces, search trees


def check_executor(config: dict[str, Any]) -> None:
    """Raises InputError for what is no executor, for Ray settings that make no sense and when Ray is not there."""
    name, ray = config.get("executor"), config["ray"]
    if name not in EXECUTORS:
        raise InputError(f"executor is {name!r}{nearest(str(name), list(EXECUTORS))}: use one of local, ray.")
    check_text("ray.address", ray["address"])
    if ray["actors"] is not None:
        check_whole("ray.actors", ray["actors"], 1, "null for one on each device")
    check_whole("ray.cpus_per_actor", ray["cpus_per_actor"], 1)
    seconds = ray["timeout_seconds"]
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < float("inf"):
        raise InputError(f"ray.timeout_seconds is {seconds!r}: give a number above 0.")
    if name == "local":
        return
    if find_spec("ray") is None:
        raise InputError("executor=ray needs Ray, which is not installed: pip install 'specbeam[ray]'.")
    if config.get("device") not in (None, "auto", "cpu", "cuda"):
        raise InputError(f"device is {config['device']!r}, but Ray gives each actor its own: use auto, cpu or cuda.")
    if config["debug"]["render_input_text"]:
        raise InputError("debug.render_input_text needs executor=local: with Ray nothing is rendered here.")


@dataclass
class Unit:
    """Cells that run back to back on one device, and what became of it."""

    cells: list[Cell]
    deaths: int = 0  # actors that died while running it
    died_on: int = -1  # the slot of the last one

    @property
    def asked(self) -> list[tuple[int, str]]:
        """(turn, prompt id) of what it answers."""
        return [(self.cells[0].turn, prompt.id) for prompt in self.cells[0].prompts]

    def reads(self, answers: Answers) -> Answers:
        """The earlier answers that it carries on."""
        keys = ((cell.method.label, prompt.id, turn) for cell in self.cells for prompt in cell.prompts
                for turn in range(cell.turn))
        return {key: answers[key] for key in keys if key in answers}


def units_of(cells: Sequence[Cell]) -> list[Unit]:
    """The cells, in their order, one unit per prompt batch, turn and repeat."""
    units: dict[tuple, Unit] = {}
    for cell in cells:
        key = cell.repeat, cell.turn, tuple(prompt.id for prompt in cell.prompts)
        units.setdefault(key, Unit([])).cells.append(cell)
    return list(units.values())


class Worker:
    """The actor: a loaded pair on its own device. `load` is a call of its own, so that placing an actor (which may
    wait for ever on a full cluster) and loading a model (which may take minutes) can be told apart."""

    def where(self) -> dict[str, Any]:
        """Node, device and process: for environment.json."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return {"node": ray.util.get_node_ip_address(), "gpus": gpus, "pid": os.getpid()}

    def load(self, plan: Plan, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Load and warm up; what the models decided (run.resolve) and the notes they had. Raises InputError."""
        import torch

        from specbeam.experiment.run import load_models, resolve, warm_up

        here = self.where()
        self.name = f"{here['node']}:{here['pid']}"  # of the rows it makes
        torch.set_num_threads(config["ray"]["cpus_per_actor"])
        notes: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("specbeam").addHandler(handler)
        self.plan, self.config = plan, config
        self.models = load_models(plan, config)
        self.models.check(plan.methods)
        warm_up(plan, list(plan.cells())[: len(plan.methods)], self.models, config)
        gc.collect()
        gc.freeze()  # so that collecting between cells takes no time
        logging.getLogger("specbeam").removeHandler(handler)
        return resolve(plan, self.models), notes

    def run(self, cells: list[Cell], answers: Answers) -> list[Outcome]:
        from specbeam.experiment.run import run_cell

        outcomes = []
        for cell in cells:
            gc.collect()  # rather here than in the middle of a timed region
            outcomes.append(run_cell(cell, self.plan, self.models, self.config, answers))
            for row in outcomes[-1][0]:
                row["worker"] = self.name
        return outcomes

    def judge(self, rows: list[dict[str, Any]], traces: list[dict[str, Any]], facts: dict[str, Any]) -> Any:
        from specbeam.experiment.judge import judge

        return judge(self.plan, rows, traces, self.models, self.config, facts)


@dataclass
class Crew:
    """The actors of one run, by slot: an actor that died is replaced in its slot."""

    start: Callable[[], Any]  # a new actor
    load: tuple[Any, ...]  # what its `load` takes
    timeout: float  # seconds until a new actor must have a device
    actors: dict[int, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)  # what the models decided
    workers: list[dict[str, Any]] = field(default_factory=list)  # for environment.json

    def run(self, folder: Path, cells: Sequence[Cell], rows: list[dict[str, Any]], console: Console
            ) -> list[dict[str, Any]]:  # fmt: skip
        """Run the cells; all rows. A unit's rows are on disk before its actor gets the next one."""
        rows = list(rows)
        answers: Answers = {}
        for row in rows:
            remember(answers, row)

        def written(outcomes: list[Outcome]) -> None:
            new, traces, searches = ([line for lines in column for line in lines]
                                     for column in zip(*outcomes, strict=True))  # fmt: skip
            records.append_cells(folder, new, traces, searches)
            rows.extend(new)
            for row in new:
                remember(answers, row)
            for _ in outcomes:
                progress.advance()

        with Progress(len(cells), console) as progress:
            progress.say(f"{len(self.actors)} actors")
            run_units(self, units_of(cells), answers, written)
        return rows

    def judge(self, rows: list[dict[str, Any]], traces: list[dict[str, Any]], facts: dict[str, Any]) -> Any:
        import ray

        for actor in self.actors.values():
            try:
                return ray.get(actor.judge.remote(rows, traces, facts))
            except ray.exceptions.RayActorError:
                continue
        raise InputError("No actor is left to judge the answers: the rows are on disk; start the same command again.")


@contextmanager
def crew_of(plan: Plan, config: dict[str, Any], console: Console) -> Iterator[Crew]:
    """Connect, place and load the actors, print their notes.

    Raises InputError: no cluster within the time-out, more actors than devices, devices that others hold, models that
    cannot be loaded.
    """
    import ray

    settings = config["ray"]
    connect(settings["address"], settings["timeout_seconds"])
    try:
        count, resources = devices(ray.cluster_resources(), config)
        # the driver's folders, for workers that may stand elsewhere
        plan = replace(plan, target=absolute(plan.target), draft=plan.draft and absolute(plan.draft),
                       evaluator=plan.evaluator and absolute(plan.evaluator))
        shared = ray.put(plan)
        Actor = ray.remote(**resources)(Worker)
        crew = Crew(Actor.remote, (shared, config), settings["timeout_seconds"])
        crew.actors = {slot: crew.start() for slot in range(count)}
        placed = [actor.where.remote() for actor in crew.actors.values()]
        there, waiting = ray.wait(placed, num_returns=count, timeout=settings["timeout_seconds"])
        if waiting:
            raise InputError(
                f"Only {len(there)} of {count} actors got a device within {settings['timeout_seconds']:g} seconds: "
                "others hold them; lower ray.actors or raise ray.timeout_seconds."
            )
        try:
            crew.workers = ray.get(placed)
            loaded = ray.get([actor.load.remote(*crew.load) for actor in crew.actors.values()])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, InputError) else InputError(
                f"An actor could not load the models: {one_line(cause or error)}.") from None
        except ray.exceptions.RayActorError as error:
            raise InputError(f"An actor died while it loaded the models: {one_line(error)}") from None
        crew.resolved = loaded[0][0]
        kinds = {f"{found['device']} {found['dtype']} {found['runner']}" for found, _ in loaded}
        if len(kinds) > 1:
            raise InputError("The cluster's devices are of different kinds, so that their rows could not be compared "
                             f"({'; '.join(sorted(kinds))}): choose with device, dtype and runner.")
        for note in sorted({note for _, notes in loaded for note in notes}):
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        yield crew
    finally:
        ray.shutdown()


def connect(address: str | None, timeout: float) -> None:
    """`ray.init`, within `timeout` seconds. Without an address Ray looks for one itself (RAY_ADDRESS, a cluster on this
    machine), or starts an instance of its own; tokens are Ray's business."""
    import ray

    named = address or os.environ.get("RAY_ADDRESS")
    if named and named != "local":
        # Ray can wait without end for a server that is none: another process finds out whether this one may try.
        code = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)"
        try:
            subprocess.run([sys.executable, "-c", code, named], check=True, timeout=timeout, capture_output=True)
        except subprocess.TimeoutExpired:
            raise InputError(f"No Ray cluster answered at ray.address={named} within {timeout:g} seconds.") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise InputError(f"No Ray cluster could be reached at ray.address={named}: {lines[-1][:300]}.") from None
    own = {"include_dashboard": False} if not named or named == "local" else {}
    ray.init(address=address, logging_level="ERROR", log_to_driver=False, **own)


def devices(resources: dict[str, float], config: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each reserves: a GPU where the cluster has some and `device` does not forbid it, else
    `ray.cpus_per_actor` cores."""
    settings = config["ray"]
    gpus, cores = int(resources.get("GPU", 0)), settings["cpus_per_actor"]
    on_gpu = config["device"] == "cuda" or (config["device"] in (None, "auto") and gpus > 0)
    most = gpus if on_gpu else int(resources.get("CPU", 0) // cores)
    what = "GPUs" if on_gpu else f"times {cores} free CPU core{'s' * (cores > 1)} (ray.cpus_per_actor)"
    wanted = settings["actors"] or most
    if wanted > most or most == 0:
        raise InputError(f"ray.actors is {settings['actors']}, but the cluster has {most} {what}: one actor takes one "
                         "device.")
    return wanted, {"num_cpus": cores, "num_gpus": int(on_gpu), "max_restarts": 0, "max_task_retries": 0}


def absolute(path: str) -> str:
    folder = from_user(path)
    return str(folder.resolve()) if folder.is_dir() else path


def run_units(crew: Crew, units: Sequence[Unit], answers: Answers, written: Callable[[list[Outcome]], None]) -> None:
    """Deal the units out until none is left. written: takes what came in, before anything else is dealt out."""
    import ray

    waiting = deque(units)
    # Later turns read the answers of repeat 0.
    unanswered = {asked for unit in units if unit.cells[0].repeat == 0 for asked in unit.asked}
    idle = dict(crew.actors)
    running: dict[Any, tuple[int, Unit]] = {}
    loading: dict[Any, tuple[int, Any, float]] = {}  # slot, its first sign of life, since when
    failures = dict.fromkeys(crew.actors, 0)

    def replace_actor(slot: int) -> None:
        crew.actors[slot] = actor = crew.start()
        loading[actor.load.remote(*crew.load)] = (slot, actor.where.remote(), time.monotonic())

    def give_up(slot: int) -> None:
        ray.kill(crew.actors.pop(slot))

    def next_for(slot: int) -> Unit | None:
        for place, unit in enumerate(waiting):
            elsewhere = unit.died_on != slot or len(crew.actors) == 1
            if elsewhere and not any((turn, name) in unanswered for last, name in unit.asked for turn in range(last)):
                del waiting[place]
                return unit
        return None

    while waiting or running:
        for slot in list(idle):
            if (unit := next_for(slot)) is not None:
                running[idle.pop(slot).run.remote(unit.cells, unit.reads(answers))] = slot, unit
        outcomes: list[Outcome] = []
        ended: list[Unit] = []
        if not running and not loading:  # nobody is left, or what is left waits for an answer that will not come
            ended, waiting = [*waiting], deque()
            outcomes = [outcome for unit in ended for outcome in failed(unit, "no actor was left to run it.")]
        pending = [*running, *loading]
        ready = ray.wait(pending, num_returns=1, timeout=crew.timeout)[0] if pending else []
        if ready:
            ready = ray.wait(pending, num_returns=len(pending), timeout=0)[0]
        for reference in ready:
            if reference in loading:
                slot = loading.pop(reference)[0]
                try:
                    ray.get(reference)
                    idle[slot], failures[slot] = crew.actors[slot], 0
                except ray.exceptions.RayError:
                    failures[slot] += 1
                    replace_actor(slot) if failures[slot] < MOST_DEATHS else give_up(slot)
                continue
            slot, unit = running.pop(reference)
            try:
                outcomes += ray.get(reference)
                ended.append(unit)
                idle[slot] = crew.actors[slot]
            except ray.exceptions.RayActorError as error:
                unit.deaths, unit.died_on = unit.deaths + 1, slot
                replace_actor(slot)
                if unit.deaths < MOST_DEATHS:
                    waiting.appendleft(unit)
                else:
                    ended.append(unit)
                    outcomes += failed(unit, f"its actor died, and died again elsewhere ({one_line(error)})")
            except ray.exceptions.RayError as error:  # not the cell's own: it would be in its rows
                outcomes += failed(unit, one_line(error))
                ended.append(unit)
                idle[slot] = crew.actors[slot]
        for reference, (slot, sign, since) in list(loading.items()):
            placed = ray.wait([sign], timeout=0)[0]
            if not placed and time.monotonic() - since > crew.timeout:  # its device went with its node
                del loading[reference]
                give_up(slot)
        for unit in ended:
            unanswered.difference_update(unit.asked if unit.cells[0].repeat == 0 else ())
        if outcomes:
            written(outcomes)


def failed(unit: Unit, error: str) -> list[Outcome]:
    """The unit's cells as failed rows."""
    return [([failed_row(cell, prompt, cell.batch_id, error) for prompt in cell.prompts], [], [])
            for cell in unit.cells]  # fmt: skip
