"""`specbeam audit`: the config, the models, the table. What is checked is in specbeam/audit.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError
from specbeam.experiment.loaded import Models
from specbeam.experiment.plan import (
    PlannedMethod,
    check_device_and_dtype,
    check_draft,
    check_whole,
    in_words,
    model_path,
    plan_methods,
)
from specbeam.experiment.prompts import prompts_from_config
from specbeam.runners import check_runner

if TYPE_CHECKING:
    from rich.console import Console

    from specbeam.audit import Finding

_COLOURS = {"same": "green", "near-ties": "yellow", "different": "bold red"}


def run_audit(config: dict[str, Any], console: Console) -> int:
    """Audit and print; the exit status: 1 on a real difference. Raises InputError for what makes no sense."""
    for name in ("max_new_tokens", "draws"):
        check_whole(name, config[name], 1)
    check_whole("seed", config["seed"], 0)
    methods = plan_methods(config["methods"], config["only"], config["max_new_tokens"])
    for method in methods:
        if not method.method.speculates or method.kind.startswith("transformers_"):
            raise InputError(f"methods.{method.label} is of kind {method.kind}: an audit is of speculative kinds, "
                             "which it holds against their plain methods.")
    dtypes = config["dtypes"]
    if not isinstance(dtypes, list) or not dtypes:
        raise InputError(f"dtypes is {dtypes!r}: give a list, for example [float32, bfloat16].")
    target = model_path(config, "target")
    if target is None:
        raise InputError("target.path is null: give bundled, a folder or a hub id.")
    draft = check_draft(methods, target, model_path(config, "draft"))
    for dtype in dtypes:
        check_device_and_dtype(config["device"], dtype)
    check_sampled(methods, dtypes, config["device"], config["only"])
    check_runner(config["runner"] or "auto", config["precision"], config["draft"].get("precision"))
    prompts = prompts_from_config(config)

    from specbeam.audit import audit

    def load(dtype: str) -> Models:
        with console.status(f"loading models in {dtype}"):
            same = any(method.same_vocabulary for method in methods)
            models = Models(target, draft, config["device"], dtype, same, config["runner"], config["precision"],
                            draft_precision=config["draft"].get("precision"))
        models.check(methods)
        return models

    def say(finding: Finding) -> None:
        console.print(f"[{_COLOURS[finding.verdict]}]{finding.verdict:9}[/] {finding.dtype:9} {finding.method}: "
                      f"{finding.detail}", highlight=False, soft_wrap=True)

    settings = {method.label: method.settings for method in methods}
    findings = audit(settings, dtypes, load, [prompt.conversation(0) for prompt in prompts], config, say)
    if not findings:  # dtype auto was not float32
        raise InputError(f"dtypes is {dtypes}, in which nothing was checked: sampled methods are audited in float32 "
                         "only, so add it.")
    if left_out := [label for label in settings if label not in {finding.method for finding in findings}]:
        console.print(f"Not checked: {in_words(left_out)} (sampled methods are audited in float32 only: add it to "
                      "dtypes).", style="yellow", highlight=False, soft_wrap=True)
    wrong = [finding for finding in findings if finding.verdict == "different"]
    ties = [finding for finding in findings if finding.verdict == "near-ties"]
    if wrong:
        console.print(f"Verdict: {len(wrong)} of {len(findings)} checks found a real difference.", style="bold red")
        return 1
    rest = f" ({len(ties)} with near-ties of the target's own logits)" if ties else ""
    console.print(f"Verdict: the output is the target's own in {'all ' * (len(findings) > 1)}{len(findings)} "
                  f"check{'s' * (len(findings) > 1)}{rest}.", style="bold green")
    return 0


def check_sampled(methods: Sequence[PlannedMethod], dtypes: list[str], device: str | None, only: Any) -> None:
    """Raises InputError for sampled methods that no dtype lets check, if they were asked for by name or are all."""
    from specbeam.models import resolve_device, resolve_dtype

    where = resolve_device(device or "auto")
    known = {str(resolve_dtype(dtype, where)) for dtype in dtypes}
    labels = [method.label for method in methods if method.samples]
    if not labels or known & {"torch.float32", "auto"}:  # auto: the checkpoint says
        return
    if only is not None or len(labels) == len(methods):
        raise InputError(f"dtypes is {dtypes}, but {in_words(labels)} sample{'s' * (len(labels) == 1)}, which is "
                         "audited in float32 only (the rounding of others is no property of the method): add float32.")
