"""The composed tree of a run: what may stand in it (`cil.checking` finds what is wrong with one)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cil.fast import Fast
from cil.optim import Recipe
from cil.precision import PrecisionName
from cil.search import Search
from kd.schedule import Schedule, stop_rules

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$"


class ConfigError(ValueError):
    """Problems with a config, one a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Section(BaseModel):
    """A part of the tree: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Scenario(Section):
    """Which classes come when.

    Attributes:
        task_sizes: An explicit list such as [50, 10, 7]; excludes the two increments.
        initial_increment: Classes of the first task; null takes `increment`.
        increment: Classes of every further task.
        classes: Use the first so many classes of the order only; null uses all.
        class_order: `natural`, `seeded` (the iCaRL convention, by `order_seed`), a named order, a list or a file.
        order_seed: Seed of `class_order=seeded`; 1993 is the common one.
        remainder: What happens to classes that fill no whole task.
    """

    task_sizes: list[Annotated[int, Field(gt=0)]] | None = None
    initial_increment: int | None = Field(None, gt=0)
    increment: int | None = Field(None, gt=0)
    classes: int | None = Field(None, gt=0)
    class_order: str | list[int] = "natural"
    order_seed: int = Field(1993, ge=0, lt=2**32)
    remainder: Literal["last_small", "error", "merge_last"] = "last_small"


class Memory(Section):
    """The exemplars of old classes.

    Attributes:
        size: Exemplars in all, or per class with `budget=per_class`; 0 keeps none.
        budget: `total`: divided among the classes seen; `per_class`: so many of each; `fixed_total`: divided among all
            classes of the run from the start.
        selection: Which samples of a class are kept.
        transform: Choose by features of the clean image (`test`) or of an augmented view (`train`, the release).
        when: Choose before fine-tuning, or again after it with the network as it is then.
    """

    size: int = Field(2000, ge=0)
    budget: Literal["total", "per_class", "fixed_total"] = "total"
    selection: str = "herding"
    transform: Literal["test", "train"] = "test"
    when: Literal["before_finetuning", "after_finetuning"] = "before_finetuning"


class Evaluation(Section):
    """How results are read.

    Attributes:
        batch_size: Images at a time.
        precision: Number format; null takes that of training.
        every_epochs: Evaluate on `evaluate_on` every so many epochs too; 0 does not. The result is logged, nothing
            depends on it.
        nearest_mean: Also read the classifier of the nearest mean of exemplars, where a learner keeps any.
        continuum: Also report forgetting and transfer by the definitions of continuum 1.2.3, as the release logs them.
    """

    batch_size: int = Field(256, gt=0)
    precision: PrecisionName | None = None
    every_epochs: int = Field(0, ge=0)
    nearest_mean: bool = True
    continuum: bool = False


class Checkpointing(Section):
    """When a run is saved, beside the end of every stage; no part of what comes out.

    Each says when a save is due; between two by time there is also at least fifty times as long as the last one took.

    Attributes:
        every_seconds: After so many seconds; null never by time.
        every_steps: After so many steps of the optimiser; null never by steps.
        every_epochs: After so many epochs of a phase; null never by epochs.
    """

    every_seconds: Annotated[float, Field(gt=0)] | None = 60.0
    every_steps: Annotated[int, Field(gt=0)] | None = None
    every_epochs: Annotated[int, Field(gt=0)] | None = None


class Part(BaseModel):
    """A registered class by name, with its hyper-parameters beside the name; checked against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters."""
        return dict(self.model_extra or {})


class Data(Part):
    """A data set by name.

    Attributes:
        root: Folder of the data sets.
        download: Whether torchvision may fetch what is missing.
        validation: Fraction of the training images held out, stratified and seeded.
        augment: Augmentations by name, each with its parameters; null switches one off.
        strong: The same for a second view of every image, for methods that read one.
    """

    root: Path = Path("data")
    download: bool = False
    validation: float = Field(0.0, ge=0, lt=1)
    augment: dict[str, dict[str, Any] | None] = {}
    strong: dict[str, dict[str, Any] | None] = {}


class Counting(Section):
    """When a distillation term counts; epochs are those of a phase.

    Attributes:
        warmup_epochs: Its weight grows in a straight line over so many epochs; 0 starts with all of it.
        epoch_base: What the first epoch counts as in that.
        stop: The rule that ends it, by its name under `rule` with its parameters; null for none.
    """

    warmup_epochs: int = 0
    epoch_base: Literal[0, 1] = 1
    stop: dict[str, Any] | None = None

    def schedule(self) -> Schedule:
        """The schedule of one term.

        Raises:
            ValueError: If a value is out of range or has no effect.
        """
        stop = dict(self.stop or {})
        rule = stop_rules[stop.pop("rule")](**stop) if self.stop is not None else None
        return Schedule(warmup_epochs=self.warmup_epochs, epoch_base=self.epoch_base, stop=rule)


def counting_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a distillation term that say when it counts; none for a term without a schedule."""
    return {key: value for key, value in values.items() if key in Counting.model_fields}


class RunConfig(Section):
    """What every run has.

    Attributes:
        name: Name of the run folder.
        runs_dir: Where run folders are.
        overwrite: Move a run folder of the same name aside instead of refusing.
        plan: Say what the run will take instead of running; no part of what is stored.
        profile: Write where the time of a few steps goes into `profile` in the run folder; no part of what is stored.
        experiment: The experiment this came from, for the record.
        seed: Everything random comes from it, but not the class order.
        data_seed: Another seed for the held-out images and the augmentation, so that runs of several seeds see the
            same views; null takes `seed`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        num_threads: Threads of the processor; null leaves it to torch. Small networks are hardly slower with one, and
            much faster where another job keeps a core busy.
        precision: Number format of training; `auto` is bf16 where the hardware has it.
        evaluate_on: The test set, or the images held out by `data.validation`.
        data: The data set.
        model: The network.
        fast: Which faster ways of computing are taken (`cil.fast`).
        kd: Distillation terms by name, each with `method` (default: its own name), `weight`, hyper-parameters, and
            when it counts (`Counting`).
        optim: How a phase is trained.
        evaluation: How results are read.
        checkpoint: When the run is saved.
        log: Where events go beside `events.jsonl` (`cil.sinks`); one name, or several. No part of what comes out.
        snapshots: Keep what the report shows beyond the numbers (`cil.snapshots`): small pictures of test images and
            exemplars among it. No part of what comes out.
    """

    name: str = Field(pattern=_NAME)
    runs_dir: Path = Path("runs")
    overwrite: bool = False
    plan: bool = Field(False, exclude=True)
    profile: bool = Field(False, exclude=True)
    experiment: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    data_seed: int | None = Field(None, ge=0, lt=2**63)
    device: str = "auto"
    num_threads: int | None = Field(None, gt=0)
    precision: PrecisionName = "auto"
    evaluate_on: Literal["test", "validation"] = "test"
    data: Data
    model: Part
    fast: Fast = Fast()
    kd: dict[str, dict[str, Any]] = {}
    optim: Recipe
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    log: Annotated[list[str], BeforeValidator(lambda found: [found] if isinstance(found, str) else found)] = []
    snapshots: bool = True

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        if self.evaluate_on == "validation" and not self.data.validation:
            raise ValueError("evaluate_on=validation needs images held out: set data.validation, for example to 0.1")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs_dir / self.name

    @property
    def split_seed(self) -> int:
        """The seed of held-out images and augmentation."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def exemplars(self) -> Memory:
        """The exemplar memory; none unless the kind of run has one."""
        return Memory(size=0)


class Config(RunConfig):
    """A class-incremental run.

    Attributes:
        scenario: The division of the data set into tasks.
        learner: The method.
        memory: The exemplars.
    """

    scenario: Scenario
    learner: Part
    memory: Memory

    @property
    def exemplars(self) -> Memory:
        """The exemplar memory."""
        return self.memory


class Cache(Section):
    """What a teacher says, kept on disk.

    Attributes:
        folder: Where; runs that share it and have the same teacher, data and views find what others left.
        max_gib: Largest size on disk of what one teacher says.
    """

    folder: Path
    max_gib: float = Field(16.0, gt=0)


class StaticConfig(RunConfig):
    """A run of static distillation: networks trained one after another on all classes, each beside the one before it.

    Attributes:
        student: Name of the network; `model` is what it stands for.
        teacher: What the first network learns from: the name of a network (its newest finished run), the name of a run
            or the path of a run folder; null for none.
        assistants: Networks between teacher and student, the largest first, by name (TAKD).
        generations: How often the student is trained, each time beside the one before it (Born-Again).
        teacher_cache: Where what a teacher says is kept between runs; null keeps nothing.
        search: How the student is found before it is trained, in the place of the one that is named; null for none.
    """

    student: str
    teacher: str | None = None
    assistants: dict[str, Part] = {}
    generations: int = Field(1, gt=0)
    teacher_cache: Cache | None = None
    search: Search | None = None

    @property
    def networks(self) -> list[tuple[str, Part]]:
        """The networks in the order in which they are trained, by name."""
        return [*self.assistants.items(), *[(self.student, self.model)] * self.generations]
