"""Many runs by one command: `python train_incremental.py -m learner=dkt,icarl kd=kd,dkd seed=0,1,2`.

Hydra makes the product of all values and starts the runs, one after another or by a launcher (`hydra/launcher=joblib`,
`hydra/launcher=submitit_slurm`). Each is a run like any other: finished ones are passed over, interrupted ones go on.
"""

import io
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from cil.checking import check
from cil.checkpoint import write_json
from cil.config import ConfigError, RunConfig

_OUTCOME = "outcome.json"
#: Keys that a run's own name tells already.
_TOLD = {"experiment", "learner", "kd", "seed", "student", "teacher", "assistants"}
_EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's word for keys that name no job


def sweep(arguments: Sequence[str], program: str, config_name: str) -> int:
    """Run what the words ask for.

    Args:
        arguments: Overrides without `-m`; a value `a,b` or `range(3)` is swept, words of Hydra choose the launcher.
        program: How the command is called.
        config_name: `train_incremental` or `distill`.

    Returns:
        0 if all runs are finished, else 1 if one failed, else 2 if one was refused; 130 if interrupted.

    Raises:
        ConfigError: If the words cannot be read, two runs would share a folder, or all of them are refused.
    """
    from cil.cli import check_choice, check_options, groups

    if "RANK" in os.environ:
        raise ConfigError(["-m starts the runs itself: leave torchrun out, or start a single run with it"])
    of_hydra = [word for word in arguments if re.match(r"\+*hydra[./]", word)]
    # of words for one key the last counts
    own = list({_key(word): word for word in arguments if word not in of_hydra}.values())
    check_options(own)
    swept, jobs = expand(own)
    for word in {word for job in jobs for word in job if _key(word) in groups()}:
        check_choice(_key(word), word.partition("=")[2])  # Hydra would stop the whole sweep in the middle
    plans = [_planned(job, swept, config_name) for job in jobs]
    names = [plan.name for plan in plans if isinstance(plan, RunConfig)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            [f"two runs of this sweep would share the folder {twice[0]}: leave name= and runs_dir= alone"]
        )
    first = next((plan for plan in plans if isinstance(plan, RunConfig)), None)
    if first is None:
        raise ConfigError([problem for plan in plans if isinstance(plan, ConfigError) for problem in plan.problems])
    print(f"{len(jobs)} runs, {len(jobs) - len(names)} of them refused")
    folder = (first.runs_dir / "sweeps" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")).absolute()
    constant = [_key(word) for word in own if _key(word) not in swept]
    interrupted = _launch(
        [
            *(_known(word) for word in own),
            f"hydra.sweep.dir={folder}",
            "hydra.output_subdir=null",
            *(f"hydra/{kind}=disabled" for kind in ("job_logging", "hydra_logging")),
            f"{_EXCLUDED}=[{','.join(constant)}]",
            *of_hydra,
        ],
        program,
        config_name,
    )
    outcomes = [_outcome(folder / str(number)) for number in range(len(jobs))]
    told = [" ".join(word for word in job if _key(word) in swept) or " ".join(job) for job in jobs]
    return _report(told, plans, outcomes, interrupted=interrupted)


def expand(words: Sequence[str]) -> tuple[set[str], list[list[str]]]:
    """The keys that are swept, and the words of every run, in Hydra's order.

    Raises:
        ConfigError: If a word cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
    except OverrideParseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [f"{error.override!r} cannot be read ({reason}); quote a value with special characters"]
        ) from error
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [word]
        for word, override in zip(words, parsed, strict=True)
    ]
    swept = {_key(word) for word, override in zip(words, parsed, strict=True) if override.is_sweep_override()}
    return swept, [list(job) for job in itertools.product(*choices)]


def named(job: Sequence[str], swept: set[str], config_name: str) -> list[str]:
    """The words of a run with a name that no other run of the sweep has: its own, and what is swept beside that."""
    from cil.cli import compose

    own = {_key(word): word for word in job}
    told = {"name"} if "name" in own else _TOLD
    parts = [word.lstrip("+") for key, word in own.items() if key in swept - told]
    name = "-".join([compose(list(job), config_name)["name"], *parts])
    return [
        *(word for word in job if _key(word) != "name"),
        f"name='{re.sub(r'[^A-Za-z0-9._+=-]+', '.', name).strip('.')}'",
    ]


def _planned(job: Sequence[str], swept: set[str], config_name: str) -> RunConfig | ConfigError:
    from cil.cli import compose

    try:
        return check(compose(named(job, swept, config_name), config_name))
    except ConfigError as error:
        return error


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _known(word: str) -> str:
    """An override that Hydra lets through whether its config has the key or not; `cil.cli.compose` checks it."""
    from cil.cli import groups

    return word if word.startswith(("+", "~")) or _key(word) in groups() else f"++{word}"


def _launch(words: list[str], program: str, config_name: str) -> bool:
    """Hand over to Hydra; tells whether the sweep was interrupted.

    Raises:
        ConfigError: If Hydra cannot begin; it has said why.
    """
    import hydra

    from cil.cli import config_folder

    before = sys.argv
    sys.argv = [program, "-m", *words]
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(run_job)()
    except KeyboardInterrupt:
        return True
    except SystemExit as error:
        launchers = "hydra/launcher=joblib (pip install dkt-incremental[parallel]) or submitit_slurm (...[slurm])"
        raise ConfigError([f"Hydra could not begin the sweep, for the reason above; launchers: {launchers}"]) from error
    finally:
        sys.argv = before
    return False


def run_job(_: Any) -> int:
    """One run of a sweep, perhaps in a process or on a machine of its own; writes how it ended into its job folder.

    Raises:
        KeyboardInterrupt: If it was interrupted: the sweep ends.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from cil.cli import main

    hydra = HydraConfig.get()
    GlobalHydra.instance().clear()  # the run composes its config itself, and there can be one at a time
    config_name = str(hydra.job.config_name)
    job = [re.sub(r"^\+\+", "", word) for word in hydra.overrides.task]
    swept = {_key(word) for word in job} - set(hydra.job.config.override_dirname.exclude_keys)
    said = _Twice(sys.stderr)
    with redirect_stderr(said):
        try:
            code = main(named(job, swept, config_name), config_name=config_name)
        except ConfigError as error:  # a name that cannot be made of what is asked for
            code = 2
            print(f"error: {error.problems[0]}", file=sys.stderr)
        except Exception as error:  # a bug of one run is named with the others and does not stop them
            code = 1
            traceback.print_exc()
            print(f"error: {error!r}", file=sys.stderr)
    if code in (130, 143):
        raise KeyboardInterrupt
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    folder = Path(hydra.runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _OUTCOME, {"code": code, "reason": errors[-1].removeprefix("error: ") if errors else ""})
    return code


class _Twice(io.StringIO):
    """Keeps what is written, and passes it on."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.stream.flush()


def _outcome(folder: Path) -> dict[str, Any]:
    """How a job ended; one that left no word was lost with its process."""
    path = folder / _OUTCOME
    if not path.exists():
        return {"code": 1, "reason": "it left no word: its process died, or never began"}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _report(
    jobs: Sequence[str],
    plans: Sequence[RunConfig | ConfigError],
    outcomes: Sequence[dict[str, Any]],
    *,
    interrupted: bool,
) -> int:
    """Print the table of what there is and the runs that are not; returns the exit code."""
    from cil.report.comparison import grouped
    from cil.report.folders import is_run, read_run
    from cil.report.table import as_table

    folders = [plan.folder for plan in plans if isinstance(plan, RunConfig) and is_run(plan.folder)]
    if folders:
        print()
        print(as_table(grouped([read_run(folder) for folder in folders])))
    if interrupted:
        print("interrupted; the same command again goes on where it was stopped", file=sys.stderr)
        return 130
    kinds = {1: "failed", 2: "refused"}
    bad = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome["code"]]
    for job, outcome in bad:
        print(f"{kinds.get(outcome['code'], 'failed')}: {job}: {outcome['reason']}", file=sys.stderr)
    codes = {outcome["code"] for _, outcome in bad}
    return 0 if not codes else 2 if codes == {2} else 1
