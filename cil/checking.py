"""Whether a composed tree is a config: every problem with it at once."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from cil.config import Config, ConfigError, Counting, Data, Part, RunConfig, StaticConfig, counting_of
from kd.registry import Registry, unknown
from kd.schedule import stop_rules

if TYPE_CHECKING:
    from cil.learners.base import Learner


def schema(entry: type) -> type[BaseModel]:
    """The keyword-only half of a constructor's signature as a pydantic model (the constructor rule)."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(entry).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (parameter.annotation, default)
    return create_model(entry.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def check(tree: Mapping[Any, Any]) -> RunConfig:
    """Check a composed tree; the parts come out whole, with the types and defaults that their constructors declare.

    Returns:
        A `StaticConfig` if the tree has a student, otherwise a `Config`.

    Raises:
        ConfigError: With every problem found: unknown keys with the nearest known one, wrong types, values out of
            range, unknown names, settings that contradict each other.
    """
    from cil.data import augmentations, data_sets
    from cil.learners.base import learners
    from cil.memory import selection_rules
    from cil.models.network import models
    from cil.sinks import sinks
    from kd import distillers

    problems = [f"{key}: every key must be a word, found {name!r}" for key, name in _no_words(tree)]
    if problems:
        raise ConfigError(problems)
    static = "student" in tree
    config: RunConfig | None = _validated(StaticConfig if static else Config, tree, "", problems)
    parts: list[tuple[str, Registry[Any]]] = [("data", data_sets), ("model", models)]
    if not static:
        parts.insert(1, ("learner", learners))
    typed: dict[str, Any] = {}
    for key, registry in parts:
        part = tree.get(key)
        if isinstance(part, Mapping) and isinstance(part.get("name"), str):
            own = {"name"} | (set(Data.model_fields) if key == "data" else set())
            values = {name: value for name, value in part.items() if name not in own}
            whole = _check_part(registry, part["name"], values, key, problems, known=own) or {}
            typed[key] = {name: value for name, value in whole.items() if name not in own}
    assistants = tree.get("assistants")
    typed_assistants: dict[str, Part] = {}
    for name, part in assistants.items() if isinstance(assistants, Mapping) else ():
        if isinstance(part, Mapping) and isinstance(part.get("name"), str):
            values = {key: value for key, value in part.items() if key != "name"}
            found = _check_part(models, part["name"], values, f"assistants.{name}", problems, known={"name"})
            typed_assistants[str(name)] = Part(name=part["name"], **(found or {}))
    data = tree.get("data")
    typed_views: dict[str, dict[str, dict[str, Any] | None]] = {}
    for view in ("augment", "strong"):
        listed = data.get(view) if isinstance(data, Mapping) else None
        typed_views[view] = {}
        for name, given in listed.items() if isinstance(listed, Mapping) else ():
            if given is None or isinstance(given, Mapping):
                checked = _check_part(augmentations, str(name), dict(given or {}), f"data.{view}.{name}", problems)
                typed_views[view][str(name)] = None if given is None else checked
    kd = tree.get("kd")
    typed_kd: dict[str, dict[str, Any]] = {}
    for name, values in kd.items() if isinstance(kd, Mapping) else ():
        if isinstance(values, Mapping):
            typed_kd[str(name)] = _check_distiller(distillers, str(name), values, problems, static=static)
    memory = tree.get("memory")
    if isinstance(memory, Mapping) and isinstance(rule := memory.get("selection", "herding"), str):
        _known(selection_rules, rule, "memory.selection", problems)
    for name in config.log if config is not None else ():
        _known(sinks, name, "log", problems)
    if problems or config is None:
        raise ConfigError(problems)
    update: dict[str, Any] = {
        "data": config.data.model_copy(update=typed["data"] | typed_views),
        "model": config.model.model_copy(update=typed["model"]),
        "kd": typed_kd,
    }
    if isinstance(config, Config):
        update["learner"] = config.learner.model_copy(update=typed["learner"])
    elif typed_assistants:
        update["assistants"] = typed_assistants
    config = config.model_copy(update=update)
    if problems := [*_stop_without_effect(config), *_contradictions(config)]:
        raise ConfigError(problems)
    return config


def _no_words(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that are no words, as YAML allows, each with where it stands."""
    for key, value in tree.items():
        if not isinstance(key, str):
            yield f"{prefix}{key}", key
        elif isinstance(value, Mapping):
            yield from _no_words(value, f"{prefix}{key}.")


def _contradictions(config: RunConfig) -> list[str]:
    """Settings that are right alone and wrong together."""
    if isinstance(config, StaticConfig):
        return _contradictions_of_static(config)
    assert isinstance(config, Config)
    from cil.learners.base import learners

    found = []
    learner = learners[config.learner.name]
    kd = "+".join(config.kd)
    if config.kd and not learner.keeps_teacher:
        found.append(
            f"kd={kd} has nothing to learn from with learner={config.learner.name}: it keeps no old network. Use "
            f"learner={_nearest(learner, _can_distil)}, or kd=none"
        )
    for name, needs in _needs(config).items() if learner.keeps_teacher else ():
        for need, reason in learner.cannot_say.items():
            if need in needs:
                others = _nearest(learner, partial(_can_say, need))
                found.append(
                    f"kd.{name} does not go with learner={config.learner.name}: {reason}. Use learner={others}"
                )
    found += _second_view_missing(config)
    if learner.needs_memory and not config.memory.size:
        found.append(
            f"learner={config.learner.name} replays exemplars and memory.size is 0: set it, or learner=finetune"
        )
    finetunes = config.learner.parameters.get("finetune_epochs") not in (None, 0, [0])
    if config.memory.when == "after_finetuning" and not finetunes:
        found.append(f"memory.when=after_finetuning has no effect: learner={config.learner.name} does not fine-tune")
    return found


def _contradictions_of_static(config: StaticConfig) -> list[str]:
    found = []
    kd = "+".join(config.kd)
    if config.kd and config.teacher is None and len(config.networks) == 1:
        found.append(
            f"kd={kd} has nobody to learn from: set teacher to the name of a network that has been trained "
            "(kd=none trains one), to the name of a run or to the path of a run folder; or generations=2"
        )
    found += _second_view_missing(config)
    if config.search is not None and config.teacher is None:
        found.append("search looks for the student of a teacher: set teacher, or search=none")
    if config.teacher_cache is not None and config.teacher is None:
        found.append("teacher_cache has no effect without a teacher: set teacher, or teacher_cache=null")
    sampling = config.optim.sampling
    partial = sampling.views > 1 or sampling.round_to > 1 or sampling.drop_last or sampling.emulate_missing_launcher
    if config.teacher_cache is not None and partial:
        found.append(
            "teacher_cache keeps passes that show every sample once: set optim.sampling.views and round_to to 1, "
            "drop_last and emulate_missing_launcher to false, or teacher_cache=null"
        )
    if not config.kd and config.teacher is not None:
        found.append(
            f"teacher={config.teacher} has no effect with kd=none: name a method, as in kd=kd, or teacher=null"
        )
    if not config.kd and len(config.networks) > 1:
        found.append(
            f"{len(config.networks)} networks one after another learn nothing from each other with kd=none: name a "
            "method, or leave out assistants and generations"
        )
    return found


#: Keys of a term that are not its method's.
_OF_TERM = {"method", "weight", "task_weight", *Counting.model_fields}


def _can_distil(learner: "type[Learner]") -> bool:
    return learner.keeps_teacher


def _can_say(need: str, learner: "type[Learner]") -> bool:
    return _can_distil(learner) and need not in learner.cannot_say


def _needs(config: RunConfig) -> dict[str, set[str]]:
    """What every distillation term reads (`Distiller.needs`)."""
    from kd import distillers

    found = {}
    for name, values in config.kd.items():
        parameters = {key: value for key, value in values.items() if key not in _OF_TERM}
        found[name] = distillers[values["method"]](**parameters).needs
    return found


def _second_view_missing(config: RunConfig) -> list[str]:
    return [
        f"kd.{name} reads a second view of every image: set data.strong, for example "
        f"'data.strong={{crop: {{padding: 4}}, flip: {{}}, randaugment: {{}}}}', or kd.{name}.views=weak"
        for name, needs in _needs(config).items()
        if "strong" in needs and not config.data.strong
    ]


def _stop_without_effect(config: RunConfig) -> list[str]:
    found = []
    for name, values in config.kd.items():
        stop = Counting(**counting_of(values)).schedule().stop
        if stop is not None and stop.end is not None and stop.end >= config.optim.epochs:
            found.append(
                f"kd.{name}.stop at epoch {stop.end} has no effect with optim.epochs={config.optim.epochs}: stop "
                "earlier, or set it to null"
            )
    return found


def _nearest(learner: "type[Learner]", works: "Callable[[type[Learner]], bool]") -> str:
    """The learners that would do, those that are like `learner` in using the memory first."""
    from cil.learners.base import learners

    found = [name for name in learners if works(learners[name])]
    return " or ".join(sorted(found, key=lambda name: learners[name].uses_memory != learner.uses_memory)[:3])


def _known(registry: Registry[Any], name: str, key: str, problems: list[str]) -> bool:
    if name not in registry:
        problems.append(f"{key}={name}: {unknown(registry.kind, name, registry)}")
        return False
    return True


def _check_part(
    registry: Registry[Any],
    name: str,
    values: Mapping[str, Any],
    key: str,
    problems: list[str],
    known: AbstractSet[str] = frozenset(),
) -> dict[str, Any] | None:
    """All values of a part, in their declared types and with its defaults; None if there is a problem with them."""
    where = (
        key
        if key.startswith(("data.augment", "data.strong"))
        else f"{key}.method"
        if key.startswith("kd.")
        else f"{key}.name"
    )
    if not _known(registry, name, where, problems):
        return None
    checked: BaseModel | None = _validated(schema(registry[name]), values, f"{key}.", problems, known)
    return None if checked is None else checked.model_dump()


def _check_distiller(
    registry: Registry[Any], name: str, values: Mapping[str, Any], problems: list[str], *, static: bool
) -> dict[str, Any]:
    method = values.get("method", name)
    counting = counting_of(values)
    own = {"method", "weight", *({"task_weight"} if static else ())} | set(Counting.model_fields)
    rest = {key: value for key, value in values.items() if key not in own}
    weights = {key: values[key] for key in ("weight", "task_weight") if key in own and key in values}
    weights = {"weight": 1.0} | weights
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            problems.append(f"kd.{name}.{key}: must be a number of 0 or more, found {weight!r}")
    if not isinstance(method, str):
        problems.append(f"kd.{name}.method: must be a name, found {method!r}")
        return {}
    if counting:  # a term without a schedule keeps the tree it always had
        counting = _check_counting(name, counting, problems)
    typed = _check_part(registry, method, rest, f"kd.{name}", problems, known=own)
    if typed is None:
        return {}
    try:
        registry[method](**typed)  # ranges are the constructor's own, since `kd` knows no config
    except ValueError as error:
        problems.append(f"kd.{name}: {error}")
    return {"method": method, **weights, **counting, **typed}


def _check_counting(name: str, values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    counting: Counting | None = _validated(Counting, values, f"kd.{name}.", problems)
    if counting is None:
        return {}
    if counting.stop is not None:
        parameters = dict(counting.stop)
        rule, where = parameters.pop("rule", None), f"kd.{name}.stop"
        if not isinstance(rule, str):
            problems.append(f"{where}.rule: must be one of {', '.join(stop_rules)}, found {rule!r}")
            return {}
        if not _known(stop_rules, rule, f"{where}.rule", problems):
            return {}
        if "validation_loss" in stop_rules[rule].reads:
            problems.append(
                f"{where}.rule={rule} reads a validation loss every epoch, which is not measured in a run by config; "
                "use rule epoch or last_drop, or the library in a loop of your own"
            )
            return {}
        typed: BaseModel | None = _validated(schema(stop_rules[rule]), parameters, f"{where}.", problems, {"rule"})
        if typed is None:
            return {}
        counting = counting.model_copy(update={"stop": {"rule": rule, **typed.model_dump()}})
    try:
        counting.schedule()
    except ValueError as error:
        problems.append(f"kd.{name}: {error}")
    return counting.model_dump()


def _validated(
    model: type[BaseModel],
    values: Mapping[str, Any],
    prefix: str,
    problems: list[str],
    known: AbstractSet[str] = frozenset(),
) -> Any:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        seen = set()
        for detail in error.errors():
            line = _sentence(model, detail, prefix, known)
            if line not in seen:  # a union reports every alternative
                seen.add(line)
                problems.append(line)
        return None


def _sentence(model: type[BaseModel], detail: ErrorDetails, prefix: str, known: AbstractSet[str]) -> str:
    path = _path(model, detail["loc"])
    key = prefix + ".".join(str(part) for part in path)
    if detail["type"] == "extra_forbidden":
        fields = sorted(set(_fields_at(model, path[:-1])) | (known if len(path) == 1 else set()))
        text = unknown("key", str(path[-1]), fields)
        return f"{key}: " + (text.split(" Known:")[0] if "did you mean" in text else text)
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    found = detail.get("input")
    message = detail["msg"].removeprefix("Value error, ")
    if not path:
        return message
    shown = repr(found) if len(repr(found)) < 60 else repr(found)[:57] + "..."
    return f"{key}: {message[0].lower()}{message[1:]}, found {shown}"


def _path(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A pydantic location without the names of union alternatives, which are no keys."""
    path: list[int | str] = []
    current: Any = model
    for part in location:
        if get_origin(current) is dict:
            path.append(part)
            current = _inner(get_args(current)[1])
        elif current is not None:
            path.append(part)
            current = _inner(current.model_fields[str(part)].annotation) if part in current.model_fields else None
        elif isinstance(part, int):
            path.append(part)
    return tuple(path)


def _inner(annotation: Any) -> Any:
    """The section or the mapping with names of its own that an annotation speaks of; None if there is none."""
    if get_origin(annotation) is dict or (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
        return annotation
    return next((inner for inner in map(_inner, get_args(annotation)) if inner is not None), None)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in path:
        current = _inner(current.model_fields[str(part)].annotation)
    return list(current.model_fields)
