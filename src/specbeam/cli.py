"""The command line: specbeam compare | generate | report | audit | forecast | models | doctor | completion | lm-eval.

Nothing heavy is imported until a command needs it, so that help is instant. Exit status: 0; 1 when a cell failed;
2 for input that makes no sense, said in one sentence; 130 when interrupted.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from specbeam import __version__
from specbeam.errors import InputError
from specbeam.paths import from_user

OUTCOMES = {0: "done", 2: "refused"}
CONF = Path(__file__).resolve().parent / "conf"
COMMANDS = ("compare", "generate", "report", "audit", "forecast", "models", "doctor", "completion", "lm-eval")

USAGE = """\
specbeam: run, compare and prove LLM decoding methods on Hugging Face models.

  specbeam compare [key=value …]             compare methods on prompts; the defaults need nothing else
  specbeam generate "prompt" [key=value …]   stream one answer by one method
  specbeam report <run folder> […]           show a run's table and write its report again; several side by side
  specbeam forecast [key=value …]            which draft and draft length pay, before running them
  specbeam audit [key=value …]               is a speculative method's output the target's own, on your pair?
  specbeam models                            the presets: size, context, chat template, in the cache or not
  specbeam doctor                            what works on this machine
  specbeam completion bash|zsh               shell completion: eval "$(specbeam completion bash)"
  specbeam lm-eval run --model specbeam …    the lm-evaluation-harness on a method (pip install 'specbeam[lm-eval]')

  specbeam <command> --help                  every key and its default
  specbeam --version

Examples:
  specbeam compare target=qwen2.5-3b-instruct 'only=[greedy,speculative]' max_new_tokens=128
  specbeam compare prompt_set.path=question.jsonl prompt_set.per_category=2
  specbeam compare 'prompts=["Why is the sky blue?"]' methods.s8='{kind: speculative, draft_length: 8}'
  specbeam generate "Why is the sky blue?" method=speculative draft_length=8 temperature=0.7
"""
COMPARE = """\
specbeam compare [key=value …] [--multirun] [--cfg job]

  --multirun    run every combination of values that commas separate (batch_size=1,4), each in its own folder;
                several at once with hydra/launcher=joblib, submitit_slurm or ray (docs/scaling.md)
  --cfg job     print the composed config and stop

"""
GENERATE = """\
specbeam generate "prompt" [key=value …] [--cfg job]

"""
FORECAST = """\
specbeam forecast [key=value …] [draft=[a,b,prompt_lookup]] [--cfg job]

Generates with the target once, holds each draft against the answers in one pass, measures what a round costs, and says
which draft and draft length to use, or not to speculate. Exact in accepted tokens for greedy chains (docs/forecast.md).

"""
AUDIT = """\
specbeam audit [key=value …] [--cfg job]

Holds speculative methods against their plain methods, token for token and, where they sample, by their distribution.
Exit status 1 on a real difference.

"""
REPORT = """\
specbeam report <run folder> [<run folder> …] [--figures pdf|svg|png] [--output <file>]

Prints the table of a run and writes its report.html again, from what the folder holds; an interrupted run is reported
as far as it goes. Several runs come side by side on one page.

  --figures pdf    also write the charts as files for a paper into <run folder>/figures (pdf, svg or png;
                   pip install 'specbeam[figures]')
  --output file    where the page goes (one run: report.html in its folder; several: report.html here)
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status. One sentence on standard error for an InputError."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _utf8_output()
    commands = dict(zip(COMMANDS, (_compare, _generate, _report, _audit, _forecast, _models, _doctor, _completion,
                                   _lm_eval), strict=True))
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE, end="")
            return 0
        if arguments[0] in ("-V", "--version", "version"):
            print(f"specbeam {__version__}")
            return 0
        if arguments[0] not in commands:
            raise InputError(f"There is no command {arguments[0]!r}: use {', '.join(commands)} (specbeam --help).")
        for argument in arguments:
            if argument != (text := argument.encode(errors="replace").decode()):
                raise InputError(f"The argument {text!r} is not UTF-8, where ? stands in it: give it as UTF-8.")
        return commands[arguments[0]](arguments[1:])
    except InputError as error:
        print(f"specbeam: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `specbeam … | head`
        sys.stderr.close()
        return 1


def _compare(arguments: list[str]) -> int:
    overrides, flags = _split(arguments, ("--multirun", "-m", "--help", "-h", "--cfg"))
    if "--help" in flags:
        return _help(COMPARE, "config.yaml")
    from specbeam.experiment.compose import compose, expand_sweeps
    from specbeam.experiment.launch import launch, split_launcher

    overrides, launcher = split_launcher(overrides)
    if launcher and "--multirun" not in flags:
        raise InputError(f"{launcher[0]!r} starts the jobs of a sweep: add --multirun.")
    jobs = expand_sweeps(overrides) if "--multirun" in flags else [overrides]
    configs = [compose("config", job) for job in jobs]
    if "--cfg" in flags:
        return _print_configs(configs)
    _give_each_job_a_folder(configs, bool(launcher))
    from specbeam.experiment.plan import make_plan
    from specbeam.experiment.run import compare

    console = console_to()
    if len(configs) > 1 or launcher:
        for config in configs:
            make_plan(config)  # no job starts when a later one makes no sense
    status = 0
    if launcher:
        ended = launch(configs, launcher, ["specbeam", "compare", *arguments])
        for job, config, status_of_job in zip(jobs, configs, ended, strict=True):
            console.print(f"{config['output_dir']}: {' '.join(job)}: {OUTCOMES.get(status_of_job, 'failed')}",
                          highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        console.print(f"logs: {Path(configs[0]['output_dir']).parent}/<number>.log; one page of all: specbeam report "
                      f"{' '.join(config['output_dir'] for config in configs)}",
                      highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        return max(ended)
    for number, (job, config) in enumerate(zip(jobs, configs, strict=True), start=1):
        if len(jobs) > 1:
            console.rule(f"{number} of {len(jobs)}: {' '.join(job)}")
        status = max(status, compare(config, ["specbeam", "compare", *arguments], console))
    return status


def _generate(arguments: list[str]) -> int:
    positional, flags = _split(arguments, ("--help", "-h", "--cfg"))
    if "--help" in flags:
        return _help(GENERATE, "generate.yaml")
    if not positional:
        raise InputError('specbeam generate needs a prompt: specbeam generate "Why is the sky blue?"')
    from specbeam.experiment.compose import compose

    config = compose("generate", positional[1:], open_top=True)
    if "--cfg" in flags:
        return _print_configs([config])
    from specbeam.experiment.generate import generate

    return generate(positional[0], config, console_to())


def _forecast(arguments: list[str]) -> int:
    overrides, flags = _split(arguments, ("--help", "-h", "--cfg"))
    if "--help" in flags:
        return _help(FORECAST, "forecast.yaml")
    from specbeam.experiment.compose import compose

    # draft is a group of presets, of which Hydra would take the last one of a list
    config = compose("forecast", [re.sub(r"^draft=\[", "drafts=[", override) for override in overrides])
    if "--cfg" in flags:
        return _print_configs([config])
    from specbeam.experiment.forecasting import run_forecast

    return run_forecast(config, ["specbeam", "forecast", *arguments], console_to())


def _audit(arguments: list[str]) -> int:
    overrides, flags = _split(arguments, ("--help", "-h", "--cfg"))
    if "--help" in flags:
        return _help(AUDIT, "audit.yaml")
    from specbeam.experiment.compose import compose

    config = compose("audit", overrides)
    if "--cfg" in flags:
        return _print_configs([config])
    from specbeam.experiment.auditing import run_audit

    return run_audit(config, console_to())


def _report(arguments: list[str]) -> int:
    rest, values = _with_values(arguments, ("--figures", "--output"))
    folders, flags = _split(rest, ("--help", "-h"))
    if "--help" in flags:
        print(REPORT, end="")
        return 0
    if not folders:
        raise InputError("specbeam report needs a run folder, as in: specbeam report outputs/compare/<run>")
    from specbeam.report.reporting import report

    output = values.get("--output")
    return report([Path(folder) for folder in folders], console_to(), values.get("--figures"),
                  from_user(output) if output else None)


def _models(arguments: list[str]) -> int:
    _no_arguments("models", arguments)
    from specbeam.doctor import show_models

    show_models()
    return 0


def _doctor(arguments: list[str]) -> int:
    _no_arguments("doctor", arguments)
    from specbeam.doctor import doctor

    for line in doctor():
        print(line, flush=True)
    return 0


def _no_arguments(command: str, arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"specbeam {command} takes no arguments, and got {' '.join(arguments)}.")


def _completion(arguments: list[str]) -> int:
    from specbeam.completion import SHELLS, completion

    if len(arguments) != 1:
        raise InputError(f"specbeam completion needs a shell: specbeam completion {' or '.join(SHELLS)}.")
    print(completion(arguments[0], COMMANDS), end="")
    return 0


def _lm_eval(arguments: list[str]) -> int:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed: pip install 'specbeam[lm-eval]'.")
    from specbeam.lm_eval import main as run

    return run(arguments)


def _with_values(arguments: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Flags that take a value (`--name value` or `--name=value`), taken out of the arguments."""
    left, found = [], {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in names:
            left.append(argument)
            continue
        found[name] = value if equals else next(rest, "")
        if not found[name] or found[name].startswith("-"):
            raise InputError(f"{name} wants a value (specbeam report --help).")
    return left, found


def _split(arguments: list[str], known: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """Positional arguments and flags; `--cfg` takes `job`."""
    positional: list[str] = []
    flags: set[str] = set()
    rest = iter(arguments)
    for argument in rest:
        if argument.partition("=")[0] == "--cfg" and "--cfg" in known:
            what = argument.partition("=")[2] or next(rest, "")
            if what != "job":
                raise InputError(f"--cfg {what} is not known: use --cfg job.")
            flags.add("--cfg")
        elif argument.startswith("-") and argument in known:
            flags.add({"-h": "--help", "-m": "--multirun"}.get(argument, argument))
        elif argument.startswith("-") and not argument.startswith("-=") and len(argument.split()) == 1:
            raise InputError(f"There is no flag {argument!r}: use {', '.join(known)}, or key=value.")
        else:
            positional.append(argument)
    return positional, flags


def _help(text: str, name: str) -> int:
    print(text, end="")
    print((CONF / name).read_text("utf-8"), end="")
    groups = [folder for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name != "__pycache__"]
    print("\nPresets:")
    for folder in groups:
        if f"- {folder.name}:" in (CONF / name).read_text("utf-8"):
            print(f"  {folder.name}={' | '.join(sorted(path.stem for path in folder.glob('*.yaml')))}")
    return 0


def _print_configs(configs: list[dict[str, Any]]) -> int:
    import yaml

    for number, config in enumerate(configs):
        print("---\n" * bool(number) + yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")
    return 0


def _give_each_job_a_folder(configs: list[dict[str, Any]], launched: bool) -> None:
    """Jobs of one sweep lie side by side, by number, so that the same sweep with output_dir resumes."""
    if len(configs) < 2 and not launched:
        return
    from specbeam.experiment.plan import check_text
    from specbeam.experiment.records import new_folder

    base = None
    for number, config in enumerate(configs):
        check_text("output_dir", config["output_dir"])
        if config["output_dir"]:
            config["output_dir"] = str(Path(config["output_dir"]) / str(number))
        else:
            base = base or new_folder(Path("outputs/compare"))
            config["output_dir"] = str(base / str(number))


def console_to(file: Any = None) -> Any:
    """Where tables go; also makes the notes of our own and others' code one line each, said once."""
    from rich.console import Console

    console = Console(file=file, width=None if file is None else 120)
    said: set[str] = set()

    def say_once(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        kind = re.sub(r"\d+", "#", text)  # the same note about another prompt
        if issubclass(category, UserWarning) and kind not in said:
            said.add(kind)
            console.print(f"note: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    class SayOnce(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say_once(record.getMessage(), UserWarning)

    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = say_once
    logger = logging.getLogger("specbeam")
    logger.handlers, logger.propagate = [SayOnce()], False
    logger.setLevel(logging.INFO)
    return console


def _utf8_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(encoding="utf-8", errors="replace")
