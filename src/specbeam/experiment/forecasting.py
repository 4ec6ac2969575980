"""`specbeam forecast`: config, models, table, plot, the choice as files. The working out is in specbeam/forecast.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError
from specbeam.experiment import records
from specbeam.experiment.plan import (
    PlannedMethod,
    check_device_and_dtype,
    check_text,
    check_whole,
    model_path,
    plan_method,
)
from specbeam.experiment.prompts import prompts_from_config
from specbeam.forecast import (
    Answer,
    Chances,
    Costs,
    forced_chances,
    measure_costs,
    plain_seconds,
    speculative_seconds,
)
from specbeam.models import check_path
from specbeam.paths import from_user
from specbeam.runners import check_runner

if TYPE_CHECKING:
    from rich.console import Console

    from specbeam.hardware import Hardware, Size

LOOKUP = "prompt_lookup"
ROLES = ("target", "draft")
WORTH = 1.05  # a predicted speed-up below it is not worth the trouble: about the forecast's own error
SETTINGS = ("temperature", "options", "max_new_tokens", "ngram")  # what traces were made with
BYTES = 2  # of a weight, where sizes says nothing else
KEYS = ("target", "draft", "prompt_set", "drafts", "draft_lengths", "batch_sizes", "ngram", "prompts", "system_prompt",
        "max_new_tokens", "temperature", "options", "repeats", "traces", "hardware", "sizes", "seed", "device", "dtype",
        "runner", "precision", "output_dir")


@dataclass(frozen=True)
class Traces:
    """The target's answers, and of each draft the chances of its proposals; sizes where they are known."""

    target: str
    answers: list[Answer]
    drafts: dict[str, list[Chances]]
    sampled: bool
    sizes: dict[str, list[int]]  # of the target and of each draft: hardware.Size
    # traces.json of older versions has none of these
    longest: int | None = None  # the largest draft length asked for
    settings: dict[str, Any] = field(default_factory=dict)  # SETTINGS
    paths: dict[str, str | None] = field(default_factory=dict)  # of each draft; None: prompt lookup


@dataclass(frozen=True)
class Line:
    """One line of the table. speedup: predicted, geometric mean over batches, with its 95 % interval over them."""

    draft: str
    draft_length: int
    batch_size: int
    speedup: float
    low: float | None
    high: float | None
    tokens_per_second: float
    mean_accepted_length: float
    acceptance_rate: float | None
    rounds: float
    accepted: float


def run_forecast(config: dict[str, Any], command: list[str], console: Console) -> int:
    """Forecast, print, write; exit status 0. Raises InputError for what makes no sense."""
    config = {**config, "options": {} if config["options"] is None else config["options"]}
    check(config)
    from specbeam.hardware import read_hardware

    hardware = None if config["hardware"] is None else read_hardware(config["hardware"])
    sizes = {role: size for role in ROLES if (size := _size(role, config["sizes"].get(role))) is not None}
    folder = from_user(config["output_dir"]) if config["output_dir"] else None
    if folder is not None:
        records.check_writable(folder)
        if any((folder / name).exists() for name in ("rows.jsonl", "prompts.jsonl")):
            raise InputError(f"output_dir {str(folder)!r} holds a run of specbeam compare, whose config.yaml would be "
                             "lost: give another folder.")
    lengths, batch_sizes = sorted(set(config["draft_lengths"])), list(dict.fromkeys(config["batch_sizes"]))
    costs: dict[tuple[str, int], Costs] = {}
    facts: dict[str, Any] = {}
    if config["traces"] is None:
        traces, costs, facts = _from_models(config, lengths, batch_sizes, hardware, console)
    else:
        traces = read_traces(from_user(config["traces"]), max(lengths))
        config = replayed(config, traces, command)
    if hardware is not None:
        weight_bytes = config["sizes"]["bytes_per_weight"]
        costs = _costs_elsewhere(sizes, weight_bytes, traces, hardware, lengths, batch_sizes)
    lines = [line for size in batch_sizes for draft in traces.drafts for length in lengths
             if (line := predict(traces, draft, length, size, costs[draft, size])) is not None]
    folder = folder or records.new_folder(Path("outputs/forecast"))
    folder.mkdir(parents=True, exist_ok=True)
    where = f"this machine, {facts.get('dtype')}, runner {facts.get('runner')}"
    if hardware is not None:
        where = ", ".join((hardware.name, *(f"{role} as large as {config['sizes'][role]}" for role in sizes)))
    named = [str(config["sizes"][role]) for role in sizes]
    notes = estimate_of(traces, batch_sizes, hardware, named) + ([] if hardware else doubts(costs, facts))
    show(lines, costs, where, notes, console)
    write(folder, config, command, traces, lines, costs, where, facts)
    console.print(f"forecast: {folder}", highlight=False, soft_wrap=True)
    return 0


def check(config: dict[str, Any]) -> None:
    """Raises InputError, one sentence, for what makes no sense, before a model is loaded."""
    for name in config:
        if name not in KEYS:
            raise InputError(f"There is no config key {name!r}: specbeam forecast --help lists them all.")
    for name in ("max_new_tokens", "repeats", "ngram"):
        check_whole(name, config[name], 1)
    check_whole("seed", config["seed"], 0)
    for name in ("draft_lengths", "batch_sizes"):
        if not isinstance(config[name], list) or not config[name]:
            raise InputError(f"{name} is {config[name]!r}: give a list of whole numbers, for example [1,2,4].")
        for number in config[name]:
            check_whole(f"a number of {name}", number, 1)
    if not isinstance(config["options"], dict):
        raise InputError(f"options is {config['options']!r}: give GenerationConfig names, as in {{top_p: 0.9}}.")
    for name in ("system_prompt", "output_dir", "traces"):
        check_text(name, config[name])
    _method(config)
    check_sizes(config["sizes"], config["hardware"])
    if config["traces"] is not None:
        if config["hardware"] is None:
            raise InputError("traces replays an earlier forecast on other hardware, and hardware is null: give a "
                             "preset or numbers, or leave traces out.")
        return
    if model_path(config, "target") is None:
        raise InputError("target.path is null: give bundled, a folder or a hub id.")
    named_drafts(config)
    check_device_and_dtype(config["device"], config["dtype"])
    check_runner(config["runner"] or "auto", config["precision"], config["draft"].get("precision"))
    prompts_from_config(config)


def check_sizes(sizes: Any, hardware: Any) -> None:
    """`sizes`, but for the configs that its paths lead to."""
    if not isinstance(sizes, dict):
        raise InputError(f"sizes is {sizes!r}, but it has keys: sizes.target, sizes.draft, sizes.bytes_per_weight.")
    for name in sizes:
        if name not in (*ROLES, "bytes_per_weight"):
            raise InputError(f"There is no config key 'sizes.{name}': sizes has target, draft, bytes_per_weight.")
    weight_bytes: Any = sizes.get("bytes_per_weight")
    number = isinstance(weight_bytes, int | float) and not isinstance(weight_bytes, bool)
    if not number or not 0 < weight_bytes < math.inf:
        raise InputError(f"sizes.bytes_per_weight is {weight_bytes!r}: give a number above 0 (bf16: 2, fp32: 4).")
    for role in ROLES:
        check_text(f"sizes.{role}", sizes.get(role))
        if sizes.get(role) is not None:
            check_path(sizes[role])
    if hardware is None and (weight_bytes != BYTES or any(sizes.get(role) is not None for role in ROLES)):
        raise InputError("sizes has no effect on seconds that are measured, and hardware is null: give a preset or "
                         "numbers, or leave sizes out.")


def replayed(config: dict[str, Any], traces: Traces, command: Sequence[str]) -> dict[str, Any]:
    """The config with the settings that the traces were made with. Raises InputError where the command says others."""
    for name, value in traces.settings.items():
        if config[name] != value and any(argument.lstrip("+").startswith((f"{name}=", f"{name}."))
                                         for argument in command):
            raise InputError(f"{name} is {config[name]!r}, but the traces were made with {value!r}: leave it out, or "
                             "run that forecast again.")
    return {**config, **traces.settings}


def named_drafts(config: dict[str, Any]) -> dict[str, str | None]:
    """Name → path of each draft to rank; None for prompt lookup."""
    from specbeam.experiment.compose import CONF

    given = config["drafts"]
    if given is None:
        path = model_path(config, "draft")
        given = [LOOKUP if path is None else path]
    if not isinstance(given, list) or not given:
        raise InputError(f"drafts is {given!r}: give a list, as in draft=[bundled,prompt_lookup].")
    found: dict[str, str | None] = {}
    for name in map(str, given):
        preset = CONF / "draft" / f"{name}.yaml"
        if name == LOOKUP:
            found[name] = None
        elif preset.is_file() and "/" not in name:
            import yaml

            path = yaml.safe_load(preset.read_text("utf-8")).get("path")
            if path is None:
                raise InputError(f"draft {name!r} is no draft: leave it out, or use prompt_lookup.")
            found[name] = str(path)
        else:
            check_path(name)
            found[name] = name
    return found


def _method(config: dict[str, Any]) -> PlannedMethod:
    """The options of the target's answers, checked as those of a method."""
    options = {"kind": "speculative", "temperature": config["temperature"], **config["options"]}
    return plan_method("", options, config["max_new_tokens"])


def _from_models(config: dict[str, Any], lengths: list[int], batch_sizes: list[int], hardware: Hardware | None,
                 console: Console) -> tuple[Traces, dict[tuple[str, int], Costs], dict[str, Any]]:
    """Load, let the target answer once, hold every draft against the answers, measure what rounds cost."""
    import torch

    from specbeam.chat import render_prompt
    from specbeam.decoding.greedy import greedy_generate
    from specbeam.decoding.sample import sample_generate
    from specbeam.engine.support import adapt
    from specbeam.hardware import size_of
    from specbeam.models import check_drafts, load_model, precision_of_draft, resolve_device

    given: dict[str, Any] = {"device": config["device"] or "auto", "dtype": config["dtype"] or "auto",
                             "runner": config["runner"] or "auto", "precision": config["precision"]}
    target_path = str(model_path(config, "target"))
    drafts = named_drafts(config)
    check_drafts(target_path, [path for path in drafts.values() if path is not None])
    with console.status("loading the target"):
        target, tokenizer = load_model(target_path, **given)
    method = _method(config)
    options = {name: value for name, value in method.options.items() if name != "temperature" or value}
    temperature, options = options.pop("temperature", 0.0), {**options, "tokenizer": tokenizer}
    sampling = {"temperature": temperature} if temperature else {}
    prompts = prompts_from_config(config)
    ids = []
    for prompt in prompts:
        rendered = render_prompt(tokenizer, [prompt.conversation(0)], system_prompt=config["system_prompt"],
                                 device=target.device)
        ids.append(rendered.input_ids[0])
    answers = []
    with console.status("the target answers"):
        for number, one in enumerate(ids):
            generate = sample_generate if temperature else greedy_generate
            seeded = {"seed": config["seed"] + number} if temperature else {}
            out = generate(target, [one], **seeded, **sampling, **options)
            answers.append(Answer(tuple(one.tolist()), tuple(out.tokens[0]), config["max_new_tokens"]))
    if all(len(answer.tokens) < 2 for answer in answers):
        raise InputError("All answers are one token long: there is nothing to speculate on; give other prompts, "
                         "or more max_new_tokens.")
    chances: dict[str, list[Chances]] = {}
    costs: dict[tuple[str, int], Costs] = {}
    others = records.OthersLoad()
    sizes = {"target": list(asdict(size_of(target.config)).values())}
    for name, path in drafts.items():
        with console.status(f"draft {name}"):
            draft = None
            if path is not None:
                precision = precision_of_draft(config["draft"].get("precision"), given["runner"],
                                               resolve_device(given["device"]), config["precision"])
                path = "bundled-draft" if path == "bundled" else path
                draft, _ = load_model(path, **{**given, "precision": precision})
                sizes[name] = list(asdict(size_of(draft.config)).values())
            chances[name] = forced_chances(target, draft, answers, max(lengths), temperature, config["ngram"],
                                           **options)
            for size in batch_sizes if hardware is None else ():
                drafter = {"drafter": LOOKUP, "ngram": config["ngram"]} if draft is None else {}
                costs[name, size] = measure_costs(target, draft, answers, lengths, size, config["repeats"],
                                                  **drafter, **sampling, **options)
            del draft
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    facts = {"device": str(target.device), "dtype": str(target.dtype).removeprefix("torch."),
             "runner": adapt(target).runner.name, "others_busy_cores": round(others.cores(), 2)}
    settings = {name: config[name] for name in SETTINGS}
    return Traces(target_path, answers, chances, temperature > 0, sizes, max(lengths), settings, drafts), costs, facts


def predict(traces: Traces, draft: str, length: int, batch_size: int, costs: Costs) -> Line | None:
    """One draft at one length: what `specbeam compare` would measure. None when nothing was decoded."""
    from specbeam.metrics.score import mean

    chances, answers = traces.drafts[draft], traces.answers
    logs, total = [], {"seconds": 0.0, "rounds": 0.0, "drafted": 0.0, "accepted": 0.0, "tokens": 0.0}
    for start in range(0, len(answers), batch_size):
        batch = answers[start:start + batch_size]
        rows, seconds = speculative_seconds(batch, chances[start:start + batch_size], length, costs, traces.sampled)
        plain = plain_seconds(batch, costs)
        if not seconds or not plain:
            continue
        logs.append(math.log(plain / seconds))
        total["seconds"] += seconds
        total["tokens"] += sum(len(answer.tokens) - 1 for answer in batch)
        for name in ("rounds", "drafted", "accepted"):
            total[name] += sum(getattr(row, name) for row in rows)
    found = mean(logs)
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Line(draft, length, batch_size, math.exp(found.value), low, high, total["tokens"] / total["seconds"],
                total["tokens"] / total["rounds"], total["accepted"] / total["drafted"] if total["drafted"] else None,
                total["rounds"], total["accepted"])


def recommended(lines: Sequence[Line], batch_size: int) -> Line | None:
    """The fastest line at this batch size; None: do not speculate."""
    best = max((line for line in lines if line.batch_size == batch_size), key=lambda line: line.speedup)
    return best if best.speedup >= WORTH else None


def sentence(lines: Sequence[Line], batch_size: int) -> str:
    """What to do, in one sentence."""
    best = recommended(lines, batch_size)
    where = "One prompt at a time" if batch_size == 1 else f"Batches of {batch_size}"
    if best is None:
        top = max((line for line in lines if line.batch_size == batch_size), key=lambda line: line.speedup)
        return (f"{where}: do not speculate; the best of these, {top.draft} with draft length {top.draft_length}, is "
                f"predicted to decode {top.speedup:.2f} × as fast as plain decoding.")
    within = "" if best.low is None else f" (95 % over {'prompts' if batch_size == 1 else 'batches'} " \
                                         f"{best.low:.2f}–{best.high:.2f})"
    return (f"{where}: use {best.draft} with draft length {best.draft_length}, predicted to decode "
            f"{best.speedup:.2f} × as fast as plain decoding{within}.")


def estimate_of(traces: Traces, batch_sizes: Sequence[int], hardware: Hardware | None, sizes: Sequence[str]
                ) -> list[str]:
    """Why figures are estimates; empty where accepted tokens are exact and costs measured. sizes: other models, of
    whose sizes the seconds are."""
    why = []
    if traces.sampled:
        why.append("Answers are sampled: rounds and accepted tokens are expectations, for rejection sampling.")
        if max(batch_sizes) > 1:
            why.append("Seconds of sampled batches are an estimate, as if every row took its expected rounds.")
    if hardware is not None:
        why.append("Seconds are an estimate from bandwidth, compute and launch cost (docs/forecast.md).")
    if sizes:
        why.append(f"Speed-ups are an estimate for the sizes of {' and '.join(sizes)}, as if they agreed as often as "
                   f"the models that were run, {traces.target} and its drafts.")
    return why


def doubts(costs: Mapping[tuple[str, int], Costs], facts: Mapping[str, Any]) -> list[str]:
    """How far the measured costs may be off, and whether the machine was the user's own."""
    widest = max((own.doubt for own in costs.values()), default=0.0)
    why = []
    if math.isinf(widest):
        why.append("How far the costs may be off is not known: it takes repeats=2 or more, and answers of some rounds.")
    elif widest:
        why.append(f"What a round costs in plain steps is known to within {widest:.0%}, and so are the speed-ups.")
    if facts.get("others_busy_cores", 0.0) > records.BUSY_CORES:
        why.append(f"Other programs used {facts['others_busy_cores']:.1f} cores meanwhile: do not trust these seconds.")
    return why


def show(lines: Sequence[Line], costs: dict[tuple[str, int], Costs], where: str, notes: Sequence[str], console: Console
         ) -> None:
    """A table per batch size, what rounds cost, and what to do."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for size in dict.fromkeys(line.batch_size for line in lines):
        best = recommended(lines, size)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
                      title=f"batch size {size}, {where}", title_justify="left")
        for name in ("draft", "draft\nlength", "accepted\nlength", "accept.\nrate", "tokens\nper s", "× plain"):
            table.add_column(name, justify="left" if name == "draft" else "right", vertical="bottom", no_wrap=True)
        for line in (line for line in lines if line.batch_size == size):
            rate = "–" if line.acceptance_rate is None else f"{line.acceptance_rate:.0%}"
            within = "" if line.low is None else f" ({line.low:.2f}–{line.high:.2f})"
            table.add_row(Text(line.draft), str(line.draft_length), f"{line.mean_accepted_length:.2f}", rate,
                          f"{line.tokens_per_second:,.1f}", f"{line.speedup:.2f}{within}",
                          style="bold green" if line is best else "")
        console.print(table)
        for (draft, count), own in costs.items():
            if count == size:
                rows = max(own.table)
                parts = own.parts.get(rows, {})
                steps = ", ".join(f"{k + 1}: {1000 * parts[k][1]:.2f}" for k in sorted(parts))
                step = [parts[k][0] / k for k in parts if k]
                mean = f"draft step {1000 * sum(step) / len(step):.2f}; " if step else ""
                console.print(Text(f"{draft}, ms: {mean}target forward of tokens {steps}; plain step "
                                   f"{1000 * own.seconds(rows, 0):.2f}", style="dim"))
        console.print(Text(sentence(lines, size), style="bold"))
    for note in notes:
        console.print(Text(f"· {note}", style="dim"))


def write(folder: Path, config: dict[str, Any], command: list[str], traces: Traces, lines: Sequence[Line],
          costs: dict[tuple[str, int], Costs], where: str, facts: dict[str, Any]) -> None:
    """forecast.json, traces.json, forecast.svg, and of each batch size the choice (experiment/choice.py)."""
    from specbeam.experiment.choice import write_choice
    from specbeam.report.forecast_chart import chart

    sizes = list(dict.fromkeys(line.batch_size for line in lines))
    records.write_yaml(folder / "config.yaml", config)
    records.write_json(folder / "forecast.json", {
        "where": where, **facts, "command": command, "sampled": traces.sampled,
        "recommendation": {str(size): {"sentence": sentence(lines, size),
                                       "choice": asdict(best) if (best := recommended(lines, size)) else None}
                           for size in sizes},
        "lines": [asdict(line) for line in lines],
        "costs": [{"draft": draft, "batch_size": size,
                   "known_within": found.doubt if math.isfinite(found.doubt) else None,
                   "seconds": {str(n): {str(k): s for k, s in sorted(own.items())} for n, own in found.table.items()}}
                  for (draft, size), found in costs.items()]})
    records.write_json(folder / "traces.json", asdict(traces))
    (folder / "forecast.svg").write_text(chart([asdict(line) for line in lines], where), "utf-8")
    drafts = traces.paths or {name: name for name in traces.drafts}
    for size in sizes:
        write_choice(folder / f"batch-{size}", config, traces.target, recommended(lines, size), drafts, size)


def read_traces(folder: Path, longest: int) -> Traces:
    """traces.json of an earlier forecast."""
    path = folder / "traces.json"
    if not path.is_file():
        raise InputError(f"traces={str(folder)!r} is no folder of a forecast: traces.json is wanted in it.")
    try:
        found = json.loads(path.read_text("utf-8"))
        answers = [Answer(tuple(one["prompt"]), tuple(one["tokens"]), one["room"]) for one in found.pop("answers")]
        traces = Traces(answers=answers, **found)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{str(path)!r} cannot be read as the traces of a forecast: run the forecast again.") from None
    asked = traces.longest
    if asked is None and LOOKUP not in traces.drafts:  # of an older version: a lookup proposes less than was asked for
        asked = max((len(own) for chances in traces.drafts.values() for row in chances for own in row), default=0)
    if asked is not None and longest > asked:
        raise InputError(f"draft_lengths goes up to {longest}, but the traces in {str(folder)!r} up to {asked}: give "
                         "shorter ones, or run that forecast again with longer ones.")
    return traces


def _costs_elsewhere(sizes: Mapping[str, Size], weight_bytes: float, traces: Traces, hardware: Hardware,
                     lengths: Sequence[int], batch_sizes: Sequence[int]) -> dict[tuple[str, int], Costs]:
    from specbeam.hardware import Size, costs_on

    context = sum(len(one.prompt) + len(one.tokens) / 2 for one in traces.answers) / len(traces.answers)
    target = sizes.get("target") or Size(*traces.sizes["target"])
    found = {}
    for draft in traces.drafts:
        own = None if draft == LOOKUP else sizes.get("draft") or Size(*traces.sizes[draft])
        for size in batch_sizes:
            found[draft, size] = costs_on(hardware, target, own, lengths, size, context, float(weight_bytes))
    return found


def _size(role: str, path: str | None) -> Size | None:
    if path is None:
        return None
    from specbeam.hardware import size_of
    from specbeam.models import open_config

    config = open_config("bundled-draft" if role == "draft" and path == "bundled" else path)
    try:
        return size_of(config)
    except Exception as error:
        raise InputError(f"The config of {path!r} does not tell its size ({' '.join(str(error).split())[:200]}): give "
                         f"another with sizes.{role}=<folder or hub id>.") from None
