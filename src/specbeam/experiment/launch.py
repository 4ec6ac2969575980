"""A sweep's jobs through one of Hydra's launcher plugins (joblib, submitit, Ray): several at a time, elsewhere.

    specbeam compare --multirun hydra/launcher=joblib hydra.launcher.n_jobs=2 batch_size=1,4

Our own compose made and checked the jobs' configs before anything starts; the plugin only starts them. Every job
writes a run folder of its own, and what it would print, a traceback too, to <number>.log beside it.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specbeam.errors import InputError
from specbeam.experiment.compose import CONF
from specbeam.paths import from_user

PACKAGES = {"joblib": "hydra-joblib-launcher", "submitit_local": "hydra-submitit-launcher",
            "submitit_slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher", "ray_aws": "hydra-ray-launcher"}


def split_launcher(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the jobs, and those that name and set the launcher. Raises InputError for other ones of Hydra's
    own."""
    own = [text for text in overrides if text.lstrip("+~").startswith(("hydra/", "hydra."))]
    for text in own:
        if not text.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher.")):
            raise InputError(f"{text!r} is no setting of specbeam: of Hydra's own, hydra/launcher=… and "
                             "hydra.launcher.… are read.")
    if own and not any(text.startswith("hydra/launcher=") for text in own):
        raise InputError(f"{own[0]!r} sets a launcher that is not named: give hydra/launcher={', '.join(PACKAGES)}.")
    return [text for text in overrides if text not in own], own


def launch(configs: list[dict[str, Any]], own: Sequence[str], command: list[str]) -> list[int]:
    """Run the jobs by the launcher that `own` names; their exit statuses, in order.

    Raises InputError for a launcher that is not installed and for settings that it does not have.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException, MissingConfigException
    from hydra.types import HydraContext
    from omegaconf.errors import OmegaConfBaseException

    for config in configs:  # a job may start elsewhere
        config["output_dir"] = str(from_user(config["output_dir"]).resolve())
    base = Path(configs[0]["output_dir"]).parent
    base.mkdir(parents=True, exist_ok=True)
    name = next(text for text in own if text.startswith("hydra/launcher=")).partition("=")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with initialize_config_dir(str(CONF), version_base="1.3"):
                hydra = compose("config", return_hydra_config=True, overrides=[
                    *own, "hydra.mode=MULTIRUN", f"hydra.sweep.dir='{base / '.hydra'}'", "hydra.job.chdir=false",
                    "hydra.output_subdir=null"])
                found = GlobalHydra.instance().hydra
                assert found is not None
                context = HydraContext(found.config_loader, Callbacks(hydra))
                launcher = Plugins.instance().instantiate_launcher(
                    hydra_context=context, config=hydra, task_function=partial(run_job, configs, command))
                # Only the numbers matter: each job's config is ours.
                done = launcher.launch([[] for _ in configs], initial_job_idx=0)
    except MissingConfigException:
        wanted = f"pip install {PACKAGES[name]}" if name in PACKAGES else f"use one of {', '.join(PACKAGES)}"
        raise InputError(f"There is no launcher {name!r} here: {wanted}.") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"The launcher {name!r} does not take these settings: "
                         f"{' '.join(str(error).split())[:300]}") from None
    return [job.return_value for job in done]


def run_job(configs: list[dict[str, Any]], command: list[str], _: Any) -> int:
    """One job, wherever it runs; its exit status."""
    from hydra.core.hydra_config import HydraConfig

    from specbeam.cli import console_to
    from specbeam.experiment.run import compare

    config = configs[HydraConfig.get().job.num]
    logger = logging.getLogger("specbeam")
    before = logger.handlers, logger.propagate, warnings.showwarning
    with open(f"{config['output_dir']}.log", "a", encoding="utf-8") as log:
        try:
            return compare(config, command, console_to(log))
        except InputError as error:
            print(f"specbeam: {' '.join(str(error).split())}", file=log)
            return 2
        except Exception:
            traceback.print_exc(file=log)
            return 1
        finally:  # this process may live on, the log does not
            logger.handlers, logger.propagate, warnings.showwarning = before
