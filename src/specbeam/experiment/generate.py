"""`specbeam generate "…"`: one answer by one method, streamed, and one line of figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from specbeam.decoding import BEAM_FAMILIES, METHODS
from specbeam.errors import InputError
from specbeam.experiment.compose import nearest
from specbeam.experiment.loaded import Models
from specbeam.experiment.plan import (
    check_debug,
    check_device_and_dtype,
    check_draft,
    check_text,
    check_whole,
    generation_options,
    model_path,
    plan_method,
)
from specbeam.experiment.streaming import TokenStream, legend
from specbeam.metrics.beams import beam_figures
from specbeam.runners import check_runner

if TYPE_CHECKING:
    from rich.console import Console

    from specbeam.experiment.plan import PlannedMethod
    from specbeam.trace import GenerationOutput, Hypothesis, RowTrace

KEYS = ("target", "draft", "method", "system_prompt", "max_new_tokens", "seed", "device", "dtype", "runner",
        "precision", "debug")


def generate(prompt: str, config: dict[str, Any], console: Console) -> int:
    """Stream one answer to standard output; figures go to `console`. Raises InputError for what makes no sense."""
    method = plan_answer(prompt, config)
    target = model_path(config, "target")
    if target is None:
        raise InputError("target.path is null: give bundled, a folder or a hub id.")
    draft = check_draft((method,), target, model_path(config, "draft"))
    check_device_and_dtype(config["device"], config["dtype"])
    check_runner(config["runner"] or "auto", config["precision"], config["draft"].get("precision"))
    with console.status("loading models"):
        models = Models(target, draft, config["device"], config["dtype"], method.same_vocabulary, config["runner"],
                        config["precision"], draft_precision=config["draft"].get("precision"))
    models.check((method,))
    rendered = models.render([prompt], config["system_prompt"])
    if config["debug"].get("render_input_text"):
        from specbeam.chat import show_rendered

        show_rendered(models.tokenizer, rendered, "what the model reads")
    if method.method.family in BEAM_FAMILIES:
        output = models.generate(method, rendered, [config["seed"]])
        print(models.tokenizer.decode(output.tokens[0], skip_special_tokens=True))
        console.print(
            "(beams do not stream: the best answer is only known at the end)",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
        if output.search is not None:
            from specbeam.report.beam_tree import beam_tree

            tokenizer, returned = models.tokenizer, len(output.hypotheses[0])
            console.print(beam_tree(output.search[0], lambda token: str(tokenizer.decode([token])), returned))
    else:
        output = models.generate(method, rendered, [config["seed"]], streamer=TokenStream(models.tokenizer, console))
    trace, best = output.trace[0], output.hypotheses[0][0]
    line = Text(figures(method, trace, best), style="dim")
    if method.method.family not in BEAM_FAMILIES and console.is_terminal:
        line.append_text(legend(trace.sources))
    if method.method.family != "stochastic_beam" and (beams := beam_words(output)):  # whose draws come by chance
        line.append(beams)
    console.print(line, highlight=False, soft_wrap=True)
    return 0


def beam_words(output: GenerationOutput) -> str:
    """How far ahead the best hypothesis was, and how different the beams are."""
    found = beam_figures(output.hypotheses[0], output.search[0] if output.search else None)
    if found["beam_gap"] is None:
        return ""
    pairs = found["beam_distinct"][1]
    distinct = f" · {pairs:.0%} of the beams' token pairs distinct" if pairs else ""
    return f" · {found['beam_gap']:.3f} ahead of the second{distinct}"


def plan_answer(prompt: str, config: dict[str, Any]) -> PlannedMethod:
    """Check the composed config of generate.yaml: every key it does not know is a setting of the method."""
    if not prompt.strip():
        raise InputError('The prompt is empty: specbeam generate "Why is the sky blue?"')
    check_whole("max_new_tokens", config["max_new_tokens"], 1)
    check_whole("seed", config["seed"], 0)
    check_text("system_prompt", config["system_prompt"])
    check_debug(config["debug"])
    settings = {key: value for key, value in config.items() if key not in KEYS}
    for key in settings:
        known = [*KEYS, *(option for row in METHODS.values() for option in row.options), *generation_options()]
        if key not in known:
            raise InputError(f"There is no key {key!r}{nearest(key, known)}: specbeam generate --help lists them.")
    return plan_method("", {"kind": config["method"], **settings}, config["max_new_tokens"])


def figures(method: PlannedMethod, trace: RowTrace, answer: Hypothesis) -> str:
    """New tokens, why it stopped, prefill and decode rate; for a method that drafts, how well that went."""
    drafter, acceptance = method.options.get("drafter"), method.options.get("acceptance")
    own = ", ".join(([drafter] if drafter else []) + (["typical acceptance: lossy"] if acceptance == "typical" else []))
    parts = [
        f"{method.kind} ({own})" if own else method.kind,
        f"{len(answer.tokens)} new tokens ({answer.finish_reason})",
        f"prefill {trace.prefill_seconds:.2f} s",
    ]
    if trace.decode_seconds > 0 and len(answer.tokens) > trace.first_tokens:
        rate = (len(answer.tokens) - trace.first_tokens) / trace.decode_seconds
        parts.append(f"{rate:.1f} tokens a second")
    drafted = sum(r.drafted for r in trace.rounds)
    if drafted:
        committed = sum(r.committed for r in trace.rounds)
        parts.append(f"mean accepted length {committed / len(trace.rounds):.2f}")
        tree = any(r.parents and list(r.parents) != list(range(-1, r.drafted - 1)) for r in trace.rounds)
        accepted = sum(r.accepted for r in trace.rounds) / drafted
        parts.append(f"acceptance rate {accepted:.2f}" + " (of a tree's nodes)" * tree)
    elif method.method.speculates and trace.rounds:
        parts.append("nothing was proposed")
    return " · ".join(parts)
