"""The command line: Hydra composes, pydantic checks, the engine runs. Parse and report; no logic."""

import json
import os
import re
import sys
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cil.stopping import Terminated, exit_code

if TYPE_CHECKING:
    from cil.build import Run
    from cil.config import RunConfig

STATIC = "distill"  # the root config of static distillation
SWEEP = ("-m", "--multirun")  # many runs by one command
MAX_LINES = 12  # of a message about a user's mistake
USAGE = """\
usage: python {program} [group=choice ...] [key=value ...]

Trains a class-incremental learner task after task. Everything is composed of the files in configs/:
{groups}
Single values:    seed=1 scenario.increment=10 memory.size=500 optim.epochs=20 precision=bf16 name=my_run
Several terms:    kd=[dkt,kd] kd.kd.weight=0.5         Without:  kd=none data.augment.cutout=null
Show, do not run: --cfg        prints the composed config
                  plan=true    prints steps, parameters, memory and time of every task
Start again:      overwrite=true  (moves the old run folder aside)
Look on:          python -m cil.watch RUN   or log=tensorboard, log=[tensorboard,wandb]
Many runs:        -m learner=dkt,icarl kd=kd,dkd seed=0,1,2   (every combination; finished ones are passed over)

The same command again goes on where an interrupted run stopped.
"""


def config_folder() -> Path:
    """Where the YAML files are: beside the package, or installed as the package `configs`."""
    return Path(__file__).resolve().parent.parent / "configs"


def groups() -> dict[str, list[str]]:
    """Config groups and their choices."""
    found: dict[str, list[str]] = {}
    others = {"__pycache__", "ablation"}  # the latter is read by `cil.ablate`
    for folder in sorted(path for path in config_folder().iterdir() if path.is_dir() and path.name not in others):
        found[folder.name] = sorted(path.stem for path in folder.glob("*.yaml"))
    return found


def compose(overrides: list[str], config_name: str = "train_incremental") -> dict[str, Any]:
    """The config tree of some overrides, without interpolations, with its default name filled in.

    Keys that do not exist are let through: the check names them, with the nearest known one.

    Raises:
        ConfigError: If Hydra cannot compose it.
    """
    if config_name != STATIC:
        tree, chosen = _compose(overrides, config_name)
    else:
        tree, chosen = _with_networks(overrides)
    tree["experiment"] = chosen.get("experiment")
    # a name such as 123 is read as a number
    tree["name"] = default_name(tree, chosen) if tree.get("name") is None else str(tree["name"])
    return tree


def _with_networks(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tree of a static run: the networks that it names become parts, and the published weights values."""
    from cil.config import ConfigError

    named, _ = _compose(overrides, STATIC)
    if any(re.match(r"\+*model=", override) for override in overrides):
        raise ConfigError(["model= has no place here: name the network by student=, and its parts by model.KEY="])
    published = named.get("published") or {}
    terms = named.get("kd") if isinstance(named.get("kd"), dict) else {}
    first = [
        f"kd.{term}.{key}={json.dumps(value)}"
        for term in terms or ()
        for key, value in (published.get(term) or {}).items()
    ]
    tree, chosen = _compose([*_network("student", named.get("student")), *first, *overrides], STATIC)
    tree.pop("published", None)
    assistants = tree.get("assistants") or []
    if isinstance(assistants, list):
        parts = {str(name): _compose(_network("assistants", name), STATIC)[0].get("model") for name in assistants}
        if len(parts) < len(assistants):
            raise ConfigError([f"assistants={assistants}: every network once; generations trains the student again"])
        tree["assistants"] = parts
    return tree, chosen


def _network(key: str, name: Any) -> list[str]:
    """What chooses a network by its name: a file of the group model, or a name of timm.

    Raises:
        ConfigError: If it is neither.
    """
    from timm.models import is_model, list_models

    from cil.config import ConfigError
    from kd.registry import unknown

    known = groups()["model"]
    if name in known and name != "timm":
        return [f"model={name}"]
    if isinstance(name, str) and is_model(name.removeprefix("timm/")):
        return ["model=timm", f"model.architecture={name.removeprefix('timm/')}"]
    near = unknown("network", str(name), [*known, *list_models()]).split(" Known:")[0]
    raise ConfigError([f"{key}={name}: {near} Known: {', '.join(known)}, and every name of timm"])


def _compose(overrides: list[str], config_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tree, and which file was chosen in which group."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from cil.config import ConfigError

    known = groups()
    prepared = []
    for override in overrides:
        match = re.match(r"^(\+{0,2})([A-Za-z_][\w.]*)=(.*)$", override, re.DOTALL)
        if match is None and not override.startswith("~"):
            raise ConfigError([f"{override!r} is no override: write key=value, such as seed=1, or group=choice"])
        if match is not None and match[2] in known:
            check_choice(match[2], match[3])
            prepared.append(f"{match[2]}={match[3]}")
        elif match is not None and match[2].split(".")[0] == "hydra":
            raise ConfigError([f"{override}: has no effect without -m; use runs_dir= and name="])
        elif match is not None:
            prepared.append(f"++{match[2]}={match[3]}")
        else:
            prepared.append(override)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            composed = hydra_compose(config_name, prepared, return_hydra_config=True)
        chosen = dict(composed.hydra.runtime.choices)
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        tree: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OverrideParseException as error:
        written, reason = error.override.removeprefix("++"), str(error).splitlines()[0]
        raise ConfigError([f"{written!r} cannot be read ({reason}); quote a value with special characters"]) from error
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.replace("++", "") for line in str(error).splitlines() if line.strip()]
        if lines[0].startswith("Error merging override ") and error.__cause__ is not None:
            reason = str(error.__cause__).splitlines()[0]
            lines = [f"{lines[0].removeprefix('Error merging override ')}: does not fit what is there ({reason})"]
        if "--multirun" in str(error):
            lines = [f"{lines[0].removesuffix(' requires --multirun')}: -m runs every value, key=[1,2] is a list"]
        raise ConfigError(lines[: MAX_LINES - 1]) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}, chosen


def check_options(words: list[str]) -> None:
    """Refuse what looks like an option and is none.

    Raises:
        ConfigError: If there is such a word.
    """
    from cil.config import ConfigError

    if unknown_flags := [word for word in words if word.startswith("-")]:
        raise ConfigError([f"{unknown_flags[0]!r} is no option: write key=value; --help lists what there is"])


def check_choice(group: str, value: str) -> None:
    """Whether a config group has such a file; `kd` takes several, as a list.

    Raises:
        ConfigError: If not, with the nearest name.
    """
    from cil.config import ConfigError
    from kd.registry import unknown

    known = groups()[group]
    choices = [choice.strip() for choice in value.strip("[]").split(",")]
    if len(choices) > 1 and group != "kd":
        raise ConfigError(
            [f"{group}={value}: one choice is needed; -m runs every one, only kd takes several, as in kd=[dkt,kd]"]
        )
    for choice in choices if value != "[]" else []:
        if choice not in known:
            raise ConfigError([f"{group}={choice}: {unknown(group, choice, known)}"])


def default_name(tree: dict[str, Any], choices: dict[str, Any]) -> str:
    """A folder name that runs of a sweep never share: experiment (or data set), learner, distillation, seed."""
    kd = tree.get("kd")
    terms = "+".join(kd) if isinstance(kd, dict) and kd else "none"
    first = choices.get("experiment") or choices.get("data")
    if "student" in tree:
        searched = tree.get("search")
        student = searched.get("method") if isinstance(searched, dict) else tree["student"]
        path = [*(tree.get("assistants") or []), student]
        if tree.get("teacher") is not None:
            path.insert(0, Path(str(tree["teacher"])).name)
        return f"{first}-{'-'.join(map(str, path))}-{terms}-seed{tree.get('seed', 0)}".replace("/", ".")
    return f"{first}-{choices.get('learner')}-{terms}-seed{tree.get('seed', 0)}"


def main(
    arguments: list[str] | None = None,
    program: str = "train_incremental.py",
    config_name: str = "train_incremental",
) -> int:
    """Run one command; returns the exit code: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted
    (SIGINT), 143 terminated (SIGTERM).

    Of the processes that torchrun starts, rank 0 speaks for all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "RANK" in os.environ:  # torch's own notes about DistributedDataParallel are no news to a user
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with nullcontext() if _is_first() else redirect_stdout(None):
        return _main(arguments, program, config_name)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _main(arguments: list[str], program: str, config_name: str) -> int:
    if any(argument in ("-h", "--help") for argument in arguments):
        listing = "\n".join(f"  {name:12s}{' '.join(choices)}" for name, choices in groups().items())
        print(USAGE.format(program=program, groups=listing))
        return 0
    show = "--cfg" in arguments
    if any(argument in SWEEP for argument in arguments):
        from cil.sweep import sweep

        try:
            return sweep([argument for argument in arguments if argument not in SWEEP], program, config_name)
        except ValueError as error:
            return _refuse(error)
    try:
        return _run([argument for argument in arguments if argument != "--cfg"], show, config_name)
    except (KeyboardInterrupt, Terminated) as error:
        if _is_first():
            print("interrupted; the same command again goes on from the last checkpoint", file=sys.stderr)
        return exit_code(error)


def _run(overrides: list[str], show: bool, config_name: str) -> int:
    from cil.checking import check
    from cil.config import ConfigError
    from cil.sinks import missing

    try:
        check_options(overrides)
        config = check(compose(overrides, config_name))
        if problems := missing(config.log):
            raise ConfigError(problems)
        if show:
            import yaml

            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if config.plan:
            return _plan(config) if _is_first() else 0
    except ValueError as error:
        return _refuse(error) if _is_first() else 2
    with ExitStack() as held:  # the lock of the run folder
        try:
            run = _prepare(config, held)
        except ValueError as error:
            return _refuse(error) if _is_first() else 2
        return _carry_out(config, run)


def _carry_out(config: "RunConfig", run: "Run | None") -> int:
    """Train what is not finished, and report; returns the exit code."""
    if run is None:
        print(f"{config.name} is finished already; overwrite=true runs it again")
    else:
        print(f"{config.name}: {run.describe()}")
        if code := _train(run):
            return code
    from cil import distributed
    from cil.folder import read_metrics
    from cil.report import write_report

    distributed.stop()
    if not _is_first():
        return 0
    try:
        report, metrics = write_report(config.folder), read_metrics(config.folder)
    except ValueError as error:
        return _refuse(error)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = {"average incremental accuracy": metrics.get("average_incremental_accuracy")}
    shown["last accuracy"] = metrics["last_accuracy"]
    print(", ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None))
    print(f"run     {_short(config.folder)}")
    print(f"report  {_short(report)}")
    return 0


def _plan(config: "RunConfig") -> int:
    """Say what a run will take; returns the exit code.

    Raises:
        ValueError: If a part of the run cannot be built as configured.
    """
    from rich.console import Console

    from cil.engine import RunFailed
    from cil.plan import plan
    from cil.plan_table import as_text

    try:
        with Console(stderr=True).status("planning: a few steps of every task ..."):
            text = as_text(plan(config))
    except OSError as error:
        raise ValueError(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")) from error
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


def _prepare(config: "RunConfig", held: ExitStack) -> "Run | None":
    """Build the parts of a run and open its folder; None if it is finished already. All processes stop if one cannot.

    Raises:
        ValueError: What keeps the first process from going on that cannot.
    """
    from cil import distributed
    from cil.folder import is_finished, open_folder
    from cil.precision import resolve_device
    from cil.static import build

    distributed.start(resolve_device(config.device))
    run, finished, problem = None, False, None
    try:
        finished = _is_first() and is_finished(config)
        if not finished:
            run = build(config)
            if _is_first():
                held.enter_context(open_folder(config))
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    distributed.agree(problem)
    return None if distributed.broadcast(finished) else run


def _train(run: "Run") -> int:
    """Train to the end; returns the exit code."""
    from cil import distributed
    from cil.engine import Engine
    from cil.events import EventLog, SilentLog
    from cil.sinks import Sinks
    from cil.stopping import Signals

    first, config = _is_first(), run.config
    try:
        with (
            Signals(patient=not first) as signals,
            Sinks(config.log if first else [], config.folder, config.model_dump(mode="json")) as sinks,
            EventLog(config.folder / "events.jsonl", listener=sinks) if first else SilentLog() as log,
        ):
            Engine(run, log, signals).run()
    except ValueError as error:  # what a person can fix and only shows now: a damaged checkpoint, too few samples
        return _refuse(error) if distributed.first_to_speak() else 2
    except (OSError, RuntimeError, MemoryError) as error:
        if (problem := _failure(error, run.config)) is None:
            raise
        if distributed.first_to_speak():
            print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def _failure(error: Exception, config: "RunConfig") -> str | None:
    """What made a run fail, for a person; None for a bug."""
    from cil import distributed
    from cil.engine import RunFailed
    from cil.room import is_out_of_memory

    goes_on = "the same command goes on from the last checkpoint"
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename or config.folder
        return f"{where}: {error.strerror or error}; mend that, and {goes_on}"
    if is_out_of_memory(error):
        size = config.evaluation.batch_size
        return f"out of memory; outside of training evaluation.batch_size={size} counts: a smaller one needs less"
    if isinstance(error, RuntimeError) and distributed.is_lost_connection(error):
        return f"another process of this run died; {goes_on}"
    return None


def _refuse(error: ValueError) -> int:
    from cil.config import ConfigError

    lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
    lines = [part for line in lines for part in line.splitlines()]
    if len(lines) > MAX_LINES - 1:
        lines = [*lines[: MAX_LINES - 2], f"and {len(lines) - MAX_LINES + 2} more"]
    print("\n".join(["error: " + lines[0], *lines[1:]]), file=sys.stderr)
    return 2


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
