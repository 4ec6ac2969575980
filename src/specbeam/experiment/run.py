"""The main job: run every cell of the plan, record its rows, then judge the answers and report.

Nothing but the method itself runs inside the time it measures: rendering, decoding to text, quality figures and
tracking come before or after.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbeam.decoding import at_once
from specbeam.errors import InputError
from specbeam.experiment import records
from specbeam.experiment.judge import judge
from specbeam.experiment.loaded import Models
from specbeam.experiment.plan import SAMPLING_OPTIONS, Cell, Plan, PlannedMethod, make_plan
from specbeam.experiment.progress import Progress
from specbeam.experiment.prompts import Prompt
from specbeam.experiment.rows import (
    Answers,
    conversation_of,
    failed_row,
    one_line,
    remember,
    row_of,
    search_of,
    trace_of,
)
from specbeam.models import check_model
from specbeam.paths import from_user

if TYPE_CHECKING:
    from rich.console import Console

WARM_UP_TOKENS = 8
# What a generation_config holds beside options of decoding.
NO_OPTIONS = ("transformers_version", "disable_compile", "use_cache", "return_dict_in_generate")


def compare(config: dict[str, Any], command: list[str], console: Console) -> int:
    """Run `specbeam compare` on a composed config. Returns the exit status: 0, or 1 when a cell failed.

    Raises InputError for input that makes no sense, KeyboardInterrupt when stopped (finished rows are on disk).
    """
    plan = make_plan(config)
    prompts = [prompt.as_record() for prompt in plan.prompts]
    folder = from_user(config["output_dir"]) if config["output_dir"] else None
    resumed = folder is not None and records.holds_run(folder, config, prompts)
    cells = left = list(plan.cells())
    rows: list[dict[str, Any]] = []
    if folder is not None and resumed:
        rows = records.keep_finished(folder, whole_groups(cells, config))
        done = {records.row_key(row) for row in rows}
        left = [cell for cell in cells if cell.row_keys()[0] not in done]
        count = f"{len(cells) - len(left)} of {len(cells)}"
        console.print(f"{folder} holds {count} cells of this run.", highlight=False, soft_wrap=True)
        if not left and (folder / "summary.json").exists():
            return show(folder, console)

    with open_executor(plan, config, console) as executor:
        # Only now, when nothing can be refused any more, something is written.
        resolved = executor.resolved
        folder = folder or records.new_folder(Path("outputs/compare"))
        config = {**config, "output_dir": str(folder)}
        if resumed:
            records.refuse_other_models(folder, resolved)
        else:
            records.start_run(folder, config, resolved, prompts)
        notes = record_environment(folder, resolved, executor.workers, command, resumed, console)
        others = records.OthersLoad()
        try:
            if left:
                rows = executor.run(folder, left, rows, console)
            if not executor.workers:  # which would count as others
                notes += note_load(folder, others.cores() if left else 0.0, notes)
            with console.status("judging the answers"):
                summary, traces = executor.judge(rows, records.read_traces(folder), {**resolved, "notes": notes})
                records.write_lines(folder / "trace.jsonl", traces)
        except KeyboardInterrupt:
            finished = len(records.read_rows(folder / "rows.jsonl"))
            console.print(
                f"\nStopped: {finished} rows are in {folder / 'rows.jsonl'}; the same command with output_dir={folder} "
                "finishes the run.",
                highlight=False,
                soft_wrap=True,
            )
            if left and not executor.workers:
                note_load(folder, others.cores(), notes)  # of rows that the finished run will hold
            raise
    records.write_json(folder / "summary.json", summary)

    from specbeam.report.build import write_report
    from specbeam.tracking import track

    write_report(folder)

    for note in track(folder, config, rows, summary):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    return show(folder, console)


@dataclass
class Local:
    """Runs the cells in this process, one after the other; `Crew` (ray_executor.py) does the same on Ray's actors."""

    plan: Plan
    config: dict[str, Any]
    models: Models
    resolved: dict[str, Any]  # what the models decided
    workers: tuple[dict[str, Any], ...] = ()

    def run(self, folder: Path, cells: list[Cell], rows: list[dict[str, Any]], console: Console
            ) -> list[dict[str, Any]]:  # fmt: skip
        rows = run_cells(folder, self.plan, cells, rows, self.models, self.config, console)
        freeze_costs(folder, self.plan, self.models)
        return rows

    def judge(self, rows: list[dict[str, Any]], traces: list[dict[str, Any]], facts: dict[str, Any]) -> Any:
        return judge(self.plan, rows, traces, self.models, self.config, facts)


@contextmanager
def open_executor(plan: Plan, config: dict[str, Any], console: Console) -> Iterator[Any]:
    """Whoever runs the cells, with models loaded and checked. Raises InputError when they cannot be."""
    with console.status("loading models") as status:
        if plan.evaluator is not None:
            check_model(plan.evaluator)  # loaded only when all rows are there
        if config["executor"] == "ray":
            from specbeam.experiment.ray_executor import crew_of

            with crew_of(plan, config, console) as crew:
                status.stop()
                yield crew
        else:
            models = load_models(plan, config)
            models.check(plan.methods)
            status.stop()
            yield Local(plan, config, models, resolve(plan, models))


def load_models(plan: Plan, config: dict[str, Any]) -> Models:
    same = any(method.same_vocabulary for method in plan.methods)
    return Models(
        plan.target, plan.draft, config["device"], config["dtype"], same, config["runner"], config["precision"],
        config.get("device_map"), config["draft"].get("precision"),
    )


def whole_groups(cells: list[Cell], config: dict[str, Any]) -> list[list[records.RowKey]]:
    """Rows that a resumed run keeps or runs again together: those of a cell; with Ray, of a batch with all its methods,
    since their times belong to one device."""
    if config["executor"] != "ray":
        return [cell.row_keys() for cell in cells]
    from specbeam.experiment.ray_executor import units_of

    return [[key for cell in unit.cells for key in cell.row_keys()] for unit in units_of(cells)]


def resolve(plan: Plan, models: Models) -> dict[str, Any]:
    """What the loaded models decided: device, dtype, and each method's options with those of the checkpoint."""
    target = models.target
    own = {
        name: value
        for name, value in target.generation_config.to_diff_dict().items()
        if name not in NO_OPTIONS and not name.startswith(("_", "output_"))
    }
    methods = {}
    for method in plan.methods:
        inherited = {name: value for name, value in own.items() if method.samples or name not in SAMPLING_OPTIONS}
        methods[method.label] = {**inherited, **method.settings, "do_sample": method.samples}
    return {
        "device": str(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "runner": models.runners(),
        "target_generation_config": own,
        "methods": methods,
    }


def record_environment(
    folder: Path, resolved: dict[str, Any], workers: Any, command: list[str], resumed: bool, console: Console
) -> list[str]:
    """Write environment.json (a resumed run adds to it); the notes for the table: a machine that is not quiet."""
    path = folder / "environment.json"
    now = records.environment(resolved["device"], resolved["dtype"], resolved["runner"], command)
    busy = records.busy_cores()
    now |= {"workers": workers} if workers else {}
    now |= {"others_busy_cores_at_start": round(busy, 2)}
    if resumed and path.exists():
        first = records.read_json(path)
        kept = {name: now[name] for name in ("started", "load_average", "others_busy_cores_at_start", "command",
                                             "git_commit", "specbeam")}
        now = {**first, "resumed": [*first.get("resumed", []), kept]}
    records.write_json(path, now)
    most = records.busiest_start(now)
    if most < records.BUSY_CORES:
        return []
    when = "started or went on" if now.get("resumed") else "started"
    note = (
        f"Other programs were using {most:.1f} of {records.cores()} cores when the run {when}: its timings are not to "
        "be trusted."
    )
    console.print(note, style="yellow", highlight=False, soft_wrap=True)
    return [note]


def note_load(folder: Path, cores: float, notes: list[str]) -> list[str]:
    """Record what others used while the methods ran, of a resumed run the most of all its parts; the note about it, if
    there is none about the start already."""
    path = folder / "environment.json"
    before = records.read_json(path)
    cores = max(round(cores, 2), before.get("others_busy_cores") or 0.0)
    records.write_json(path, {**before, "others_busy_cores": cores})
    if cores < records.BUSY_CORES or notes:
        return []
    return [f"Other programs used {cores:.1f} of {records.cores()} cores while the methods ran: the timings are not to "
            "be trusted."]


def run_cells(
    folder: Path,
    plan: Plan,
    cells: list[Cell],
    rows: list[dict[str, Any]],
    models: Models,
    config: dict[str, Any],
    console: Console,
) -> list[dict[str, Any]]:
    """Run the cells in order; every cell's rows are on disk before the next one starts. Returns all rows."""
    rows = list(rows)
    answers: Answers = {}
    for row in rows:
        remember(answers, row)
    shown: set[tuple[str, str, int]] = set()
    with Progress(len(cells), console) as progress:
        progress.say("warming up")
        warm_up(plan, cells, models, config)
        gc.collect()
        gc.freeze()  # so that collecting between cells takes no time
        try:
            for cell in cells:
                turn = f" · turn {cell.turn + 1}" if cell.turn else ""
                progress.say(f"{cell.method.label} · prompt {cell.prompts[0].id}{turn}")
                if config["debug"]["render_input_text"]:
                    show_inputs(cell, models, config, answers, shown, progress.console)
                gc.collect()  # rather here than in the middle of a timed region
                new, traces, searches = run_cell(cell, plan, models, config, answers)
                for row in new:
                    remember(answers, row)
                records.append_cells(folder, new, traces, searches)
                rows += new
                progress.advance()
        finally:
            gc.unfreeze()
    return rows


def freeze_costs(folder: Path, plan: Plan, models: Models) -> None:
    """What `draft_length: auto` has learned, in costs-<label>.json: with it (`costs`) a sampled run can be repeated."""
    from specbeam.drafting import Settings
    from specbeam.drafting.length import write_costs

    for method in plan.methods:
        known = {name: value for name, value in method.options.items() if name in Settings.__dataclass_fields__}
        if method.kind == "speculative" and known.pop("draft_length", None) == "auto" and "costs" not in known:
            label, rows = re.sub(r"[^\w.-]", "_", method.label), min(plan.batch_size, len(plan.prompts))
            with suppress(Exception):  # nothing was learned, and the run is no worse for it
                write_costs(str(folder / f"costs-{label}.json"), models.target, models.draft, rows, **known)


def warm_up(plan: Plan, cells: list[Cell], models: Models, config: dict[str, Any]) -> None:
    """Each method once, a few tokens, on the first batch: allocations, probes and compilation are in no row. Where a
    runner records shapes (on a GPU), whole answers, once for each number of rows and class of lengths."""
    from specbeam.runners.graph import RECORD, warming, width

    recorded = set(models.runners().values()) & set(RECORD)
    first = next(plan.cells()).prompts
    found: dict[tuple, tuple[int, PlannedMethod, Any, dict[str, Any]]] = {}  # length, and what to run
    for cell in cells:
        method = cell.method
        whole = bool(recorded) and not method.kind.startswith(("transformers_", "openai_"))
        prompts, most = cell.prompts if whole else first, method.options["max_new_tokens"]
        if not whole and (method.label,) in found:
            continue
        size = at_once(method.method, len(prompts), plan.batch_size)
        for group in [prompts[start : start + size] for start in range(0, len(prompts) if whole else 1, size)]:
            try:
                rendered = models.render([prompt.conversation(0) for prompt in group], config["system_prompt"])
            except Exception:  # the cell itself will fail the same way, and be recorded
                continue
            long = rendered.input_ids.shape[1]
            key = (method.label, len(group), width(long + most)) if whole else (method.label,)
            # The shortest: its answer grows through every width that the others of its class may have.
            if key not in found or long < found[key][0]:
                options = {"max_new_tokens": most if whole else min(WARM_UP_TOKENS, most),
                           **refilled(method, len(group), plan)}
                found[key] = long, method, rendered, options
    for _, method, rendered, options in sorted(found.values(), key=lambda one: -one[0]):  # long slots serve short rows
        with suppress(Exception), warming():
            models.generate(method, rendered, [0] * len(rendered.input_ids), **options)


def run_cell(
    cell: Cell, plan: Plan, models: Models, config: dict[str, Any], answers: Answers
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and (of the first repeat) traces and search trees of one cell. What goes wrong becomes failed rows."""
    size = at_once(cell.method.method, len(cell.prompts), plan.batch_size)
    groups = [cell.prompts[start : start + size] for start in range(0, len(cell.prompts), size)]
    rows: dict[str, dict[str, Any]] = {}
    traces, searches = [], []
    for group in groups:
        batch_id = cell.batch_id if len(groups) == 1 else f"{cell.batch_id}/{group[0].id}"
        fitting: list[Prompt] = []
        for prompt in group:
            error = unanswerable(cell, prompt, models, config, answers)
            if error:
                rows[prompt.id] = failed_row(cell, prompt, batch_id, error)
            else:
                fitting.append(prompt)
        if not fitting:
            continue
        try:
            conversations = [conversation_of(cell.method.label, prompt, cell.turn, answers) for prompt in fitting]
            rendered = models.render(conversations, config["system_prompt"])
            seeds = [plan.seed_of(prompt, cell.turn, cell.repeat) for prompt in fitting]
            records.reset_peak_memory(models.target.device)
            output = models.generate(cell.method, rendered, seeds, **refilled(cell.method, len(fitting), plan))
            peak = records.peak_memory(models.target.device)
            for index, prompt in enumerate(fitting):
                try:
                    refuse_nan(cell, rendered, output, index, models)
                except InputError as error:
                    rows[prompt.id] = failed_row(cell, prompt, batch_id, one_line(error))
                    continue
                rows[prompt.id] = row_of(cell, prompt, batch_id, output, index, models.tokenizer, peak)
                if cell.repeat == 0:
                    traces.append(trace_of(cell, prompt, batch_id, output, index, models.tokenizer))
                    if output.search is not None:
                        searches.append(search_of(cell, prompt, batch_id, output, index, models.tokenizer))
        except Exception as error:
            traces = [trace for trace in traces if trace["batch_id"] != batch_id]
            searches = [search for search in searches if search["batch_id"] != batch_id]
            for prompt in fitting:
                rows[prompt.id] = failed_row(cell, prompt, batch_id, one_line(error))
            release_memory()
    return [rows[prompt.id] for prompt in cell.prompts], traces, searches


def refuse_nan(cell: Cell, rendered: Any, output: Any, index: int, models: Models) -> None:
    """Raise InputError for an answer that comes of NaN. A server's model is not ours to ask."""
    if cell.method.kind != "openai_server":
        read = rendered.input_ids[index][rendered.attention_mask[index].bool()].tolist()
        models.refuse_nan(read, output.hypotheses[index][0].tokens)


def refilled(method: PlannedMethod, prompts: int, plan: Plan) -> dict[str, Any]:
    """How many of a cell's prompts run at once, where that is less than all: the next takes an ended one's place."""
    return {"batch_size": plan.batch_size} if method.method.refills and prompts > plan.batch_size else {}


def unanswerable(cell: Cell, prompt: Prompt, models: Models, config: dict[str, Any], answers: Answers) -> str | None:
    """Why this prompt cannot be asked (then its batch goes on without it), or None."""
    for earlier in range(cell.turn):
        if (cell.method.label, prompt.id, earlier) not in answers:
            return f"turn {earlier + 1} of the prompt failed, so that there is nothing to carry on."
    from specbeam.engine.support import adapt, check_lengths

    try:
        adapter = adapt(models.target)
    except InputError:
        return None  # a model that only the baselines run: they speak for themselves
    if cell.method.kind.startswith("transformers_") and not adapter.absolute:
        return None
    try:
        conversation = conversation_of(cell.method.label, prompt, cell.turn, answers)
        rendered = models.render([conversation], config["system_prompt"])
        check_lengths(adapter, [rendered.input_ids.shape[1]], [cell.method.options["max_new_tokens"]])
    except Exception as error:
        return one_line(error)
    return None


def release_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show_inputs(
    cell: Cell,
    models: Models,
    config: dict[str, Any],
    answers: Answers,
    shown: set[tuple[str, str, int]],
    console: Console,
) -> None:
    """Once for each prompt, and for later turns once for each method: exactly what target and draft read."""
    from specbeam.chat import show_rendered

    for prompt in cell.prompts:
        reader = cell.method.label if cell.turn else "every method"
        if (reader, prompt.id, cell.turn) in shown:
            continue
        shown.add((reader, prompt.id, cell.turn))
        try:
            conversation = conversation_of(cell.method.label, prompt, cell.turn, answers)
            rendered = models.render([conversation], config["system_prompt"])
        except Exception as error:  # its rows will say so
            console.print(f"prompt {prompt.id}: {one_line(error)}", highlight=False, markup=False)
            continue
        turn = f", turn {cell.turn + 1}" if prompt.answers > 1 else ""
        title = f"prompt {prompt.id}{turn}: what {reader} reads"
        show_rendered(models.tokenizer, rendered, title, console)


def show(folder: Path, console: Console) -> int:
    """The table, the report, and the exit status of a finished run folder."""
    from specbeam.report.build import write_report
    from specbeam.report.terminal import print_table

    summary = records.read_json(folder / "summary.json")
    print_table(summary, console)
    report = write_report(folder)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return 1 if any(method.get("failed") for method in summary["methods"].values()) else 0
